"""Format names, numbers, durations and times for the terminal and the report."""

import datetime as dt
from typing import TYPE_CHECKING, Any

from hpsearch.config.search import Choice, Range

if TYPE_CHECKING:
    from hpsearch.stats.intervals import Interval, Paired

SCORES = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "threshold_jaccard": "Threshold Jaccard (0.65)",
    "accuracy": "Pixel accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
}
"""Display name of each score, in the order of the rows of tables."""


def count(n: int, noun: str) -> str:
    """Return a number with its noun: `1 fold`, `5 folds`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def interval(value: "Interval | Paired", *, signed: bool = False) -> str:
    """Format a mean or difference with its interval: `0.8503 [0.8401, 0.8605]`."""
    mean = value.mean if hasattr(value, "mean") else value.difference
    return f"{number(mean, signed=signed)} {bounds(value, signed=signed)}"


def bounds(value: "Interval | Paired", *, signed: bool = False) -> str:
    """Format the bounds of an interval: `[0.8401, 0.8605]`."""
    return f"[{number(value.low, signed=signed)}, {number(value.high, signed=signed)}]"


def number(value: float, *, signed: bool = False) -> str:
    """Format a score: `0.8503`, or `+0.0123` if `signed`. The minus sign is typographic (as wide as a plus sign)."""
    return (f"{value:+.4f}" if signed else f"{value:.4f}").replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Format a duration: `45 s`, `12 min`, `3 h 20 min`, `2 days 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def timestamp(seconds: float) -> str:
    """Format a Unix time in seconds: `2026-01-31 12:00 UTC`."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def setting(value: Any) -> str:
    """Format the value of a setting: floats with three significant digits, pairs as `256x192`."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return str(value)


def dimension(searched: Choice | Range) -> str:
    """Format the search range of a setting: `2 to 4`, `0.001 to 0.3, logarithmic`, `rgb, grayscale`."""
    if isinstance(searched, Choice):
        return ", ".join(setting(value) for value in searched.values)
    text = f"{setting(searched.low)} to {setting(searched.high)}"
    if searched.step is not None:
        text += f" in steps of {setting(searched.step)}"
    return text + (", logarithmic" if searched.log else "")
