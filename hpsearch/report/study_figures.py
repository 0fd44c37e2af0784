"""Draws the figures of a whole study from its rows.

Without titles: the report and a paper caption them. As in `figures`, none touches pyplot or rcParams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from hpsearch.report.figures import FONT, HELD_OUT, INK, NAMES, PALE, RIGHT, TRAIN, literally, new_figure
from hpsearch.report.rows import Floats, TrialRow, pareto_front, position, show_value
from hpsearch.stats.intervals import Interval
from hpsearch.tuning.config import Choice, Range

OUTCOMES = {
    "full": TRAIN,
    "dropped": "#B87A00",
    "diverged": HELD_OUT,
    "failed": "#B5578F",
    "infeasible": "#7A7A7A",
    "lost": "#8C6D5A",
    "open": "#3A8FC2",
}
"""Colour of every outcome: each at least 3 to 1 against white, so that thin marks are seen."""

MIN_PLACES = 8
"""Trials that the race's axis has room for at least."""
MAX_RANKED = 25
"""Trials in the ranking's figure; the table has all."""


def draw_answer(estimates: Sequence[tuple[str, Interval]], *, metric: str) -> Figure:
    """One line for each estimate, (name, mean and interval), the first at the top."""
    figure, axis = _single(9.0, 0.7 + 0.42 * len(estimates), left=2.6, bottom=0.6, top=0.1)
    for row, (name, interval) in enumerate(estimates):
        color = (PALE, TRAIN, RIGHT, HELD_OUT)[min(row, 3)]
        axis.plot([interval.low, interval.high], [row, row], color=color, lw=5, alpha=0.4, solid_capstyle="butt")
        axis.plot([interval.mean], [row], "o", color=color, ms=7)
        _label(axis, f"{interval.mean:.4f}", interval.mean, row, 0, 8, ha="center", size=9)
        _label(axis, name, 0, row, -8, 0, ha="right", va="center", xycoords=axis.get_yaxis_transform())
    axis.set_ylim(len(estimates) - 0.5, -0.75)
    _no_y(axis)
    _x_label(axis, NAMES[metric])
    return figure


def draw_ranking(full: Sequence[TrialRow], tied: Sequence[int], cheapest: int, *, metric: str) -> Figure:
    """Mean and 95 % interval of the best full trials, best first; those tied with the best in colour."""
    rows = list(full[:MAX_RANKED])
    figure, axis = _single(9.0, 1.0 + 0.26 * len(rows), left=1.1, bottom=0.9, top=0.1)
    intervals = [trial.statistics.total for trial in rows if trial.statistics is not None]
    floor = _floor([interval.mean for interval in intervals])
    left = min(interval.low for interval in intervals if interval.mean >= floor)
    for row, (trial, interval) in enumerate(zip(rows, intervals, strict=True)):
        color = TRAIN if trial.number in tied else PALE
        name = f"trial {trial.number}"
        _label(axis, name, 0, row, -8, 0, ha="right", va="center", xycoords=axis.get_yaxis_transform(), size=9)
        if interval.mean < floor:
            axis.plot([left], [row], "<", color=color, ms=6)
            _label(axis, f"{interval.mean:.4f}", left, row, 8, 0, va="center", size=8.5)
            continue
        axis.plot([interval.low, interval.high], [row, row], color=color, lw=1.6)
        axis.plot([interval.mean], [row], "D" if trial.number == cheapest else "o", color=color, ms=6)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _no_y(axis)
    _x_label(axis, f"{NAMES[metric]} out of fold, 95 % interval")
    handles = [Line2D([], [], color=TRAIN, marker="o", lw=1.6, label="cannot be told from the best")]
    handles.append(Line2D([], [], color=TRAIN, marker="D", lw=1.6, label="the cheapest of those"))
    if any(trial.number not in tied for trial in rows):
        handles.append(Line2D([], [], color=PALE, marker="o", lw=1.6, label="behind the best"))
    _legend_below(figure, handles)
    return figure


def draw_race(trials: Sequence[TrialRow], n_folds: int, *, metric: str) -> Figure:
    """Above, every trial's mean or estimate and the best mean so far; below, how many folds were paid for it."""
    figure = new_figure(11.0, 5.6, "")
    grid = {"left": 0.075, "right": 0.985, "top": 0.98, "bottom": 0.155, "hspace": 0.1, "height_ratios": [3, 2]}
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=grid)
    for axis in (above, below):
        _plain(axis)
    known = [trial for trial in trials if trial.value is not None]
    floor = _floor([trial.value for trial in known if trial.value is not None])
    for trial in known:
        _point(above, trial.number, trial.value or 0.0, floor, trial.outcome)
    # Once trials were fitted again, only those can win.
    contenders = [trial for trial in trials if trial.statistics is not None]
    contenders = [trial for trial in contenders if trial.is_confirmed] or contenders
    means = [trial.statistics.mean for trial in contenders if trial.statistics is not None]
    best = list(zip((trial.number for trial in contenders), np.maximum.accumulate(means or [0.0]), strict=False))
    if best:
        steps = [*best, (trials[-1].number, best[-1][1])]
        above.plot([x for x, _ in steps], [y for _, y in steps], color=INK, lw=1.2, drawstyle="steps-post", zorder=1)
    if known:
        _set_floor(above, floor)
    else:
        above.set_yticks([])
        middle = {"xycoords": "axes fraction", "ha": "center", "va": "center", "color": PALE}
        _label(above, "no trial has a mean or an estimate", 0.5, 0.5, 0, 0, **middle)
    _y_label(above, NAMES[metric])
    for trial in trials:
        below.bar(trial.number, sum(trial.epochs) / trial.n_epochs, width=0.8, color=OUTCOMES[trial.outcome], lw=0)
        if not any(trial.epochs) and trial.outcome != "open":
            below.plot([trial.number], [0.08 * n_folds], "x", color=OUTCOMES[trial.outcome], ms=5)
    below.set_ylim(0, n_folds * 1.04)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = trials[0].number, trials[-1].number
    # Few trials are not drawn as walls.
    below.set_xlim(first - 0.6, max(last, first + MIN_PLACES - 1) + 0.6)
    _y_label(below, "folds trained")
    _x_label(below, "trial")
    seen = [outcome for outcome in OUTCOMES if any(trial.outcome == outcome for trial in trials)]
    handles: list[Any] = [Patch(color=OUTCOMES[outcome], lw=0, label=outcome) for outcome in seen]
    if best:
        handles.append(Line2D([], [], color=INK, lw=1.2, label="best mean so far"))
    _legend_below(figure, handles)
    return figure


def draw_importances(importances: Mapping[str, float]) -> Figure:
    """Share of the variance that each setting explains, the largest at the top."""
    figure, axis = _single(9.0, 0.7 + 0.34 * len(importances), left=2.2, bottom=0.6, top=0.1)
    for row, (name, share) in enumerate(importances.items()):
        axis.barh(row, share, height=0.62, color=TRAIN, lw=0)
        _label(axis, f"{share:.0%}", share, row, 6, 0, va="center", size=9)
        _label(axis, name, 0, row, -8, 0, ha="right", va="center", xycoords=axis.get_yaxis_transform())
    axis.set_ylim(len(importances) - 0.5, -0.5)
    axis.set_xlim(0, max(0.01, *importances.values()) * 1.12)
    _no_y(axis)
    _x_label(axis, "share of the variance between trials")
    return figure


def draw_slices(
    trials: Sequence[TrialRow], dimensions: Mapping[str, Choice | Range], best: int | None, *, metric: str
) -> Figure:
    """One panel for each setting: every mean or estimate against the setting's value; a ring marks the best trial."""
    n_columns = min(3, len(dimensions))
    n_rows = -(-len(dimensions) // n_columns)
    height = 0.75 + 2.7 * n_rows
    figure = new_figure(11.0, height, "")
    grid = {"left": 0.075, "right": 0.985, "top": 1 - 0.15 / height, "bottom": 1.0 / height}
    axes = figure.subplots(
        n_rows, n_columns, sharey=True, squeeze=False, gridspec_kw={**grid, "wspace": 0.08, "hspace": 0.42}
    )
    known = [trial for trial in trials if trial.value is not None]
    floor = _floor([trial.value for trial in known if trial.value is not None])
    for axis, (name, dimension) in zip(axes.flat, dimensions.items(), strict=False):
        _plain(axis)
        for trial in known:
            x = _coordinate(dimension, trial.params[name])
            _point(axis, x, trial.value or 0.0, floor, trial.outcome, size=5)
            if trial.number == best:
                axis.plot([x], [trial.value], "o", mfc="none", mec=INK, mew=1.4, ms=11, zorder=4)
        _scale(axis, dimension)
        _x_label(axis, name)
    for axis in axes.flat[len(dimensions) :]:
        axis.set_axis_off()
    _set_floor(axes.flat[0], floor)
    for axis in axes[:, 0]:
        _y_label(axis, NAMES[metric])
    seen = [outcome for outcome in ("full", "dropped") if any(trial.outcome == outcome for trial in known)]
    names = {"full": "full: mean", "dropped": "dropped: estimate"}
    handles = [Line2D([], [], color=OUTCOMES[each], marker="o", lw=0, label=names[each]) for each in seen]
    if best is not None:
        handles.append(Line2D([], [], marker="o", mfc="none", mec=INK, mew=1.4, ms=10, lw=0, label=f"trial {best}"))
    _legend_below(figure, handles)
    return figure


def draw_parallel(
    trials: Sequence[TrialRow], dimensions: Mapping[str, Choice | Range], best: int | None, *, metric: str
) -> Figure:
    """A line for each trial through the values of its settings to its mean or estimate; dark lines are better."""
    known = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value or 0.0)
    values = [trial.value or 0.0 for trial in known]
    floor, top = _floor(values), max(values)
    span = top - floor or 1.0
    figure, axis = _single(11.0, 4.4, left=0.9, bottom=0.75, top=0.3, right=0.9)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.grid(False)
    last = len(dimensions)
    for trial in known:
        heights = [position(dimension, trial.params[name]) for name, dimension in dimensions.items()]
        heights.append((max(trial.value or 0.0, floor) - floor) / span)
        is_best = trial.number == best
        good = heights[-1]
        color = HELD_OUT if is_best else (0.0, 0.447, 0.698, 0.12 + 0.7 * good**2)
        axis.plot(range(last + 1), heights, color=color, lw=2.6 if is_best else 1.2, zorder=3 if is_best else 1)
    posts = [[(x, 0.0), (x, 1.0)] for x in range(last + 1)]
    axis.add_collection(LineCollection(posts, colors=INK, linewidths=0.9, zorder=2))
    for x, (name, dimension) in enumerate(dimensions.items()):
        _label(axis, name, x, 0, 0, -10, ha="center", va="top", size=9)
        for value in _ticks(dimension):
            place = position(dimension, value)
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8}
            _label(axis, show_value(value), x, place, 5, 0, va="center", size=8, bbox=box, zorder=5)
    _label(axis, NAMES[metric], last, 0, 0, -10, ha="center", va="top", size=9, weight="bold")
    for share in (0.0, 0.5, 1.0):
        _label(axis, f"{floor + share * span:.3f}", last, share, 6, 0, va="center", size=8, color="#444444")
    axis.set_xlim(-0.25, last + 0.25)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks([])
    axis.set_yticks([])
    handles = [Line2D([], [], color=TRAIN, lw=1.6, label="a trial, the darker the better")]
    if best is not None:
        handles.append(Line2D([], [], color=HELD_OUT, lw=2.6, label=f"trial {best}"))
    _legend_below(figure, handles)
    return figure


def draw_costs(full: Sequence[TrialRow], best: int | None, *, metric: str) -> Figure:
    """Mean against time, memory and size of the network, with the trials that none beats in both joined by a line."""
    figure = new_figure(11.0, 3.9, "")
    grid = {"left": 0.075, "right": 0.985, "top": 0.97, "bottom": 0.27, "wspace": 0.1}
    axes = figure.subplots(1, 3, sharey=True, gridspec_kw=grid)
    values = [trial.value or 0.0 for trial in full]
    floor = _floor(values)
    costs: list[tuple[str, list[float | None]]] = [
        ("seconds of cross-validation", [trial.seconds for trial in full]),
        ("memory of a training step, MiB (predicted)", [_mebi(trial.memory_bytes) for trial in full]),
        ("parameters of the network", [None if t.n_parameters is None else float(t.n_parameters) for t in full]),
    ]
    for axis, (name, column) in zip(axes.flat, costs, strict=True):
        _plain(axis)
        kept = [(cost, trial) for cost, trial in zip(column, full, strict=True) if cost]
        for cost, trial in kept:
            _point(axis, cost, trial.value or 0.0, floor, trial.outcome, size=5)
            if trial.number == best:
                axis.plot([cost], [trial.value], "o", mfc="none", mec=INK, mew=1.4, ms=11, zorder=4)
        front = pareto_front([cost for cost, _ in kept], [trial.value or 0.0 for _, trial in kept])
        corners = [(kept[i][0], max(kept[i][1].value or 0.0, floor)) for i in front]
        axis.plot([x for x, _ in corners], [y for _, y in corners], color=RIGHT, lw=1.6, drawstyle="steps-post")
        for i in front[-4:]:
            _label(
                axis,
                str(kept[i][1].number),
                kept[i][0],
                max(kept[i][1].value or 0.0, floor),
                0,
                8,
                ha="center",
                size=8,
            )
        _scale_costs(axis, [cost for cost, _ in kept])
        _x_label(axis, name)
    _set_floor(axes.flat[0], floor)
    _y_label(axes.flat[0], NAMES[metric])
    handles = [Line2D([], [], color=TRAIN, marker="o", lw=0, label="full trial")]
    handles.append(Line2D([], [], color=RIGHT, lw=1.6, label="Pareto front: none is better and cheaper"))
    if best is not None:
        handles.append(Line2D([], [], marker="o", mfc="none", mec=INK, mew=1.4, ms=10, lw=0, label=f"trial {best}"))
    _legend_below(figure, handles)
    return figure


def draw_distribution(groups: Sequence[tuple[str, Floats]], *, metric: str) -> Figure:
    """Share of images by score, (name, scores) of each group, in bins of 0.05."""
    figure, axis = _single(9.0, 3.4, left=0.8, bottom=0.95, top=0.1)
    edges = np.linspace(0, 1, 21)
    handles: list[Any] = []
    for (name, scores), color in zip(groups, (TRAIN, HELD_OUT), strict=False):
        share, _ = np.histogram(scores, edges)
        heights = share / max(1, len(scores))
        axis.stairs(heights, edges, color=color, lw=1.8)
        axis.stairs(heights, edges, color=color, alpha=0.18, fill=True)
        axis.axvline(float(np.mean(scores)), color=color, lw=1.2, ls="--")
        handles.append(Patch(color=color, alpha=0.6, lw=0, label=f"{name} (dashed: mean {np.mean(scores):.3f})"))
    axis.set_xlim(0, 1)
    _x_label(axis, f"{NAMES[metric]} of an image")
    _y_label(axis, "share of the images")
    _legend_below(figure, handles)
    return figure


def to_pdf(figure: Figure) -> bytes:
    """The figure as a PDF file of vectors; the same bytes for the same rows."""
    buffer = BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"Creator": "hpsearch", "Producer": None, "CreationDate": None})
    return buffer.getvalue()


# Values and axes


def _floor(values: Sequence[float]) -> float:
    """The lowest value that a plot shows in its place: a few collapsed trials must not flatten all others."""
    if not values:
        return 0.0
    low, upper, high = min(values), float(np.quantile(values, 0.75)), max(values)
    return max(low, high - 5 * (high - upper)) if high > upper else low - 0.01


def _set_floor(axis: Axes, floor: float) -> None:
    _, top = axis.get_ylim()
    axis.set_ylim(floor - 0.06 * (top - floor), top)


def _point(axis: Axes, x: float, value: float, floor: float, outcome: str, *, size: float = 6) -> None:
    """A point, or a triangle on the floor for a value below it."""
    color, is_below = OUTCOMES[outcome], value < floor
    face = color if outcome == "full" else "white"
    axis.plot([x], [max(value, floor)], "v" if is_below else "o", color=color, mfc=face, mew=1.3, ms=size, zorder=3)


def _coordinate(dimension: Choice | Range, value: Any) -> float:
    if isinstance(dimension, Choice):
        return position(dimension, value) * max(1, len(dimension.values) - 1)
    return float(value)


def _scale(axis: Axes, dimension: Choice | Range) -> None:
    if isinstance(dimension, Choice):
        places = [_coordinate(dimension, value) for value in dimension.values]
        axis.set_xticks(places, [show_value(value) for value in dimension.values])
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


def _ticks(dimension: Choice | Range) -> Sequence[Any]:
    """The values that an axis of parallel coordinates names."""
    if isinstance(dimension, Choice):
        return dimension.values
    if dimension.is_int and not dimension.log and dimension.high - dimension.low <= 6:
        return range(int(dimension.low), int(dimension.high) + 1)
    low, high = float(dimension.low), float(dimension.high)
    middle = (low * high) ** 0.5 if dimension.log else (low + high) / 2
    return [dimension.low, float(f"{middle:.2g}"), dimension.high]


def _mebi(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def _scale_costs(axis: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis around these, of a factor of two at least."""
    if not costs:
        return
    low, high = min(costs), max(costs)
    margin = max((high / low) ** 0.08, (2 * low / high) ** 0.5)
    axis.set_xscale("log")
    axis.set_xlim(low / margin, high * margin)
    ticks = [digit * 10.0**power for power in range(-3, 16) for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low / margin <= tick <= high * margin]
    # Powers of ten where they are enough, else 1, 2 and 5 of each, else four places between the ends.
    tens = [tick for tick in inside if f"{tick:e}".startswith("1.0")]
    places = tens if len(tens) > 2 else inside
    if len(places) < 2:
        places = [float(f"{tick:.2g}") for tick in np.geomspace(low / margin, high * margin, 6)[1:-1]]
    axis.set_xticks(places)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(_short_number)


def _short_number(value: float, _: object = None) -> str:
    """`0.01`, `20`, `1.5k`, `31M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


# Frames and texts


def _single(
    width: float, height: float, *, left: float, bottom: float, top: float, right: float = 0.2
) -> tuple[Figure, Axes]:
    """A figure of one axes with margins in inches."""
    figure = new_figure(width, height, "")
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    axis = figure.add_axes(box)
    _plain(axis)
    return figure, axis


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, labelfontfamily=FONT)


def _no_y(axis: Axes) -> None:
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def _x_label(axis: Axes, text: str) -> None:
    literally(axis.set_xlabel(text, color=INK, size=10))


def _y_label(axis: Axes, text: str) -> None:
    literally(axis.set_ylabel(text, color=INK, size=10))


def _label(axis: Axes, text: str, x: float, y: float, dx: float, dy: float, **style: Any) -> None:
    """Text beside a point, moved by (dx, dy) points."""
    style = {"color": INK, "size": 10, **style}
    literally(
        axis.annotate(text, xy=(x, y), xytext=(dx, dy), textcoords="offset points", annotation_clip=False, **style)
    )


def _legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    if not handles:
        return
    legend = figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.015, 0.0), ncols=len(handles), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_color(INK)
        literally(text)
