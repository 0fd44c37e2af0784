"""Frames, axes, labels and legends that all figures share.

Every figure has an Agg canvas of its own, and nothing touches pyplot or rcParams, so that figures can be drawn in any
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullLocator

from hpsearch.config.search import Choice, Range
from hpsearch.report.formats import SCORES, setting

# Colours by Okabe and Ito, which people with colour blindness can distinguish.
TRAIN, HELD_OUT = "#0072B2", "#D55E00"
RIGHT, MISSED, EXTRA = "#009E73", "#E69F00", "#CC79A7"
INK, PALE = "#222222", "#6a6a6a"
FONT = "DejaVu Sans"
"""Comes with matplotlib, so that figures look the same everywhere."""
NAMES = {"loss": "Loss", **SCORES}


# Frames


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure of that size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    literally(figure.text(0.02, 1 - 0.32 / height, title, size=13, weight="bold", color=INK, va="center"))
    return figure


def single(
    width: float, height: float, *, left: float, bottom: float, top: float, right: float = 0.2
) -> tuple[Figure, Axes]:
    """Return a figure with one axes; the margins are in inches."""
    figure = new_figure(width, height)
    axis = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    style(axis)
    return figure, axis


def style(axis: Axes) -> None:
    """Give the axes a grid, no frame, and the font of all figures."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, labelfontfamily=FONT)


def hide_y(axis: Axes) -> None:
    """Remove ticks and line of the vertical axis."""
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


# Texts


def literally(text: Text) -> None:
    """Show the text as it is: user-given names may contain dollar signs, and letters that the font lacks."""
    text.set_parse_math(False)
    text.set_fontfamily(FONT)
    text.set_text(
        "".join(
            letter if letter.isspace() or ord(letter) in _letters() else "\N{REPLACEMENT CHARACTER}"
            for letter in text.get_text()
        )
    )


def x_label(axis: Axes, text: str) -> None:
    literally(axis.set_xlabel(text, color=INK, size=10))


def y_label(axis: Axes, text: str) -> None:
    literally(axis.set_ylabel(text, color=INK, size=10))


def label(axis: Axes, text: str, x: float, y: float, dx: float, dy: float, **more: Any) -> None:
    """Write text beside a point, moved by (dx, dy) typographic points."""
    more = {"color": INK, "size": 10, **more}
    literally(
        axis.annotate(text, xy=(x, y), xytext=(dx, dy), textcoords="offset points", annotation_clip=False, **more)
    )


def row_label(axis: Axes, text: str, y: float, *, size: float = 10) -> None:
    """Write text to the left of the axes at height y."""
    label(axis, text, 0, y, -8, 0, ha="right", va="center", xycoords=axis.get_yaxis_transform(), size=size)


def legend_below(figure: Figure, handles: Sequence[Any], **more: Any) -> None:
    """Add a legend in one line at the bottom of the figure; nothing without handles."""
    if not handles:
        return
    more = {"bbox_to_anchor": (0.015, 0.0), "fontsize": 9, **more}
    legend = figure.legend(handles=handles, loc="lower left", ncols=len(handles), frameon=False, **more)
    for text in legend.get_texts():
        text.set_color(INK)
        literally(text)


@cache
def _letters() -> frozenset[int]:
    """Return every letter of the font."""
    path = font_manager.findfont(font_manager.FontProperties(family=FONT))
    return frozenset(font_manager.get_font(path).get_charmap())


# Values and scales


def floor_of(values: Sequence[float]) -> float:
    """Return the lowest value that a plot shows, so that a few collapsed trials do not flatten all others."""
    if not values:
        return 0.0
    low, upper, high = min(values), float(np.quantile(values, 0.75)), max(values)
    return max(low, high - 5 * (high - upper)) if high > upper else low - 0.01


def set_floor(axis: Axes, floor: float) -> None:
    _, top = axis.get_ylim()
    axis.set_ylim(floor - 0.06 * (top - floor), top)


def position(dimension: Choice | Range, value: Any) -> float:
    """Return where a value lies in its dimension: 0 at the first or lowest, 1 at the last or highest."""
    if isinstance(dimension, Choice):
        index = dimension.values.index(tuple(value) if isinstance(value, list) else value)
        return index / (len(dimension.values) - 1) if len(dimension.values) > 1 else 0.5
    low, high, here = float(dimension.low), float(dimension.high), float(value)
    if low == high:
        return 0.5
    if dimension.log:
        low, high, here = (float(np.log(each)) for each in (low, high, here))
    return (here - low) / (high - low)


def coordinate(dimension: Choice | Range, value: Any) -> float:
    """Return the horizontal coordinate of a value on an axis that `scale` has prepared."""
    if isinstance(dimension, Choice):
        return position(dimension, value) * max(1, len(dimension.values) - 1)
    return float(value)


def scale(axis: Axes, dimension: Choice | Range) -> None:
    """Prepare the horizontal axis for the values of a dimension."""
    if isinstance(dimension, Choice):
        places = [coordinate(dimension, value) for value in dimension.values]
        axis.set_xticks(places, [setting(value) for value in dimension.values])
        for text in axis.get_xticklabels():
            literally(text)
        axis.set_xlim(min(places) - 0.5, max(places) + 0.5)
        return
    low, high = float(dimension.low), float(dimension.high)
    if dimension.log:
        axis.set_xscale("log")
        margin = (high / low) ** 0.05
        axis.set_xlim(low / margin, high * margin)
        axis.xaxis.set_major_formatter(_short_number)
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.06 * (high - low) or 0.5
        axis.set_xlim(low - margin, high + margin)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=dimension.is_int, min_n_ticks=1))


def scale_costs(axis: Axes, costs: Sequence[float]) -> None:
    """Give the horizontal axis a logarithmic scale around these costs, spanning at least a factor of two."""
    if not costs:
        return
    low, high = min(costs), max(costs)
    margin = max((high / low) ** 0.08, (2 * low / high) ** 0.5)
    axis.set_xscale("log")
    axis.set_xlim(low / margin, high * margin)
    ticks = [digit * 10.0**power for power in range(-3, 16) for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low / margin <= tick <= high * margin]
    # Powers of ten if there are enough, else 1, 2 and 5 of each, else four places between the ends.
    tens = [tick for tick in inside if f"{tick:e}".startswith("1.0")]
    places = tens if len(tens) > 2 else inside
    if len(places) < 2:
        places = [float(f"{tick:.2g}") for tick in np.geomspace(low / margin, high * margin, 6)[1:-1]]
    axis.set_xticks(places)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(_short_number)


def _short_number(value: float, _: object = None) -> str:
    """Return `0.01`, `20`, `1.5k`, `31M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
