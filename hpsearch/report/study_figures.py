"""Draw the figures of a whole study from its rows. They have no titles, because the report captions them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hpsearch.config.search import Choice, Range
from hpsearch.report.axes import (
    HELD_OUT,
    INK,
    NAMES,
    PALE,
    RIGHT,
    TRAIN,
    coordinate,
    floor_of,
    hide_y,
    label,
    legend_below,
    new_figure,
    position,
    row_label,
    scale,
    scale_costs,
    set_floor,
    single,
    style,
    x_label,
    y_label,
)
from hpsearch.report.formats import setting
from hpsearch.report.rows import TrialRow
from hpsearch.stats.intervals import Floats, Interval

OUTCOMES = {
    "complete": TRAIN,
    "pruned": "#B87A00",
    "diverged": HELD_OUT,
    "failed": "#B5578F",
    "infeasible": "#7A7A7A",
    "orphaned": "#8C6D5A",
    "open": "#3A8FC2",
}
"""Colour of every outcome, with a contrast of at least 3 to 1 against white, so that thin marks are visible."""
MIN_PLACES = 8
"""Smallest number of trials that the axis of the race has room for."""
MAX_RANKED = 25
"""Largest number of trials in the figure of the ranking; the table has all."""


def draw_answer(estimates: Sequence[tuple[str, Interval]], *, metric: str) -> Figure:
    """Draw a line for each estimate, (name, mean and interval), the first at the top."""
    figure, axis = single(9.0, 0.7 + 0.42 * len(estimates), left=2.6, bottom=0.6, top=0.1)
    for row, (name, interval) in enumerate(estimates):
        color = (PALE, TRAIN, RIGHT, HELD_OUT)[min(row, 3)]
        axis.plot([interval.low, interval.high], [row, row], color=color, lw=5, alpha=0.4, solid_capstyle="butt")
        axis.plot([interval.mean], [row], "o", color=color, ms=7)
        label(axis, f"{interval.mean:.4f}", interval.mean, row, 0, 8, ha="center", size=9)
        row_label(axis, name, row)
    axis.set_ylim(len(estimates) - 0.5, -0.75)
    hide_y(axis)
    x_label(axis, NAMES[metric])
    return figure


def draw_ranking(complete: Sequence[TrialRow], tied: Sequence[int], cheapest: int, *, metric: str) -> Figure:
    """Draw mean and 95 % interval of the best complete trials, best first; those tied with the best are in colour."""
    rows = list(complete[:MAX_RANKED])
    figure, axis = single(9.0, 1.0 + 0.26 * len(rows), left=1.1, bottom=0.9, top=0.1)
    intervals = [trial.statistics.total for trial in rows if trial.statistics is not None]
    floor = floor_of([interval.mean for interval in intervals])
    left = min(interval.low for interval in intervals if interval.mean >= floor)
    for row, (trial, interval) in enumerate(zip(rows, intervals, strict=True)):
        color = TRAIN if trial.number in tied else PALE
        row_label(axis, f"trial {trial.number}", row, size=9)
        if interval.mean < floor:
            axis.plot([left], [row], "<", color=color, ms=6)
            label(axis, f"{interval.mean:.4f}", left, row, 8, 0, va="center", size=8.5)
            continue
        axis.plot([interval.low, interval.high], [row, row], color=color, lw=1.6)
        axis.plot([interval.mean], [row], "D" if trial.number == cheapest else "o", color=color, ms=6)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    hide_y(axis)
    x_label(axis, f"{NAMES[metric]}, out of fold, with 95 % interval")
    handles = [Line2D([], [], color=TRAIN, marker="o", lw=1.6, label="tied with the best")]
    handles.append(Line2D([], [], color=TRAIN, marker="D", lw=1.6, label="cheapest of those"))
    if any(trial.number not in tied for trial in rows):
        handles.append(Line2D([], [], color=PALE, marker="o", lw=1.6, label="worse than the best"))
    legend_below(figure, handles)
    return figure


def draw_race(trials: Sequence[TrialRow], ranking: Sequence[int], n_folds: int, *, metric: str) -> Figure:
    """Draw every trial's mean or estimate with the best mean so far above, and its number of trained folds below.

    ranking: numbers of the trials that can win, best first.
    """
    figure = new_figure(11.0, 5.6)
    grid = {"left": 0.075, "right": 0.985, "top": 0.98, "bottom": 0.155, "hspace": 0.1, "height_ratios": [3, 2]}
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=grid)
    for axis in (above, below):
        style(axis)
    leaders = _leaders(trials, ranking)
    _draw_values(above, trials, leaders, metric)
    _draw_folds(below, trials, n_folds)
    seen = [outcome for outcome in OUTCOMES if any(trial.outcome == outcome for trial in trials)]
    handles: list[Any] = [Patch(color=OUTCOMES[outcome], lw=0, label=outcome) for outcome in seen]
    if leaders:
        handles.append(Line2D([], [], color=INK, lw=1.2, label="best mean so far"))
    legend_below(figure, handles)
    return figure


def _leaders(trials: Sequence[TrialRow], ranking: Sequence[int]) -> list[tuple[int, float]]:
    """Return (trial, value of the best trial up to it) for every trial that can win, by number."""
    values = {trial.number: trial.value or 0.0 for trial in trials if trial.number in ranking}
    return [(number, values[next(each for each in ranking if each <= number)]) for number in sorted(values)]


def _draw_values(axis: Axes, trials: Sequence[TrialRow], leaders: Sequence[tuple[int, float]], metric: str) -> None:
    known = [trial for trial in trials if trial.value is not None]
    floor = floor_of([trial.value or 0.0 for trial in known])
    for trial in known:
        _point(axis, trial.number, trial, floor)
    if leaders:
        steps = [*leaders, (trials[-1].number, leaders[-1][1])]
        axis.plot([x for x, _ in steps], [y for _, y in steps], color=INK, lw=1.2, drawstyle="steps-post", zorder=1)
    if known:
        set_floor(axis, floor)
    else:
        axis.set_yticks([])
        middle = {"xycoords": "axes fraction", "ha": "center", "va": "center", "color": PALE}
        label(axis, "no trial has a mean or an estimate", 0.5, 0.5, 0, 0, **middle)
    y_label(axis, NAMES[metric])


def _draw_folds(axis: Axes, trials: Sequence[TrialRow], n_folds: int) -> None:
    for trial in trials:
        axis.bar(trial.number, sum(trial.epochs) / trial.n_epochs, width=0.8, color=OUTCOMES[trial.outcome], lw=0)
        if not any(trial.epochs) and trial.outcome != "open":
            axis.plot([trial.number], [0.08 * n_folds], "x", color=OUTCOMES[trial.outcome], ms=5)
    axis.set_ylim(0, n_folds * 1.04)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = trials[0].number, trials[-1].number
    # The bars of a few trials would otherwise fill the figure.
    axis.set_xlim(first - 0.6, max(last, first + MIN_PLACES - 1) + 0.6)
    y_label(axis, "folds trained")
    x_label(axis, "trial")


def draw_importances(importances: Mapping[str, float]) -> Figure:
    """Draw the share of the variance that each setting explains, the largest at the top."""
    figure, axis = single(9.0, 0.7 + 0.34 * len(importances), left=2.2, bottom=0.6, top=0.1)
    for row, (name, share) in enumerate(importances.items()):
        axis.barh(row, share, height=0.62, color=TRAIN, lw=0)
        label(axis, f"{share:.0%}", share, row, 6, 0, va="center", size=9)
        row_label(axis, name, row)
    axis.set_ylim(len(importances) - 0.5, -0.5)
    axis.set_xlim(0, max(0.01, *importances.values()) * 1.12)
    hide_y(axis)
    x_label(axis, "share of the variance between trials")
    return figure


def draw_slices(
    trials: Sequence[TrialRow], dimensions: Mapping[str, Choice | Range], best: int, *, metric: str
) -> Figure:
    """Draw a panel for each setting: every mean or estimate by the value of the setting; a ring marks the best."""
    n_columns = min(3, len(dimensions))
    n_rows = -(-len(dimensions) // n_columns)
    height = 0.75 + 2.7 * n_rows
    figure = new_figure(11.0, height)
    grid = {"left": 0.075, "right": 0.985, "top": 1 - 0.15 / height, "bottom": 1.0 / height}
    axes = figure.subplots(
        n_rows, n_columns, sharey=True, squeeze=False, gridspec_kw={**grid, "wspace": 0.08, "hspace": 0.42}
    )
    known = [trial for trial in trials if trial.value is not None]
    floor = floor_of([trial.value or 0.0 for trial in known])
    for axis, (name, dimension) in zip(axes.flat, dimensions.items(), strict=False):
        style(axis)
        for trial in known:
            _point(axis, coordinate(dimension, trial.params[name]), trial, floor, best=best)
        scale(axis, dimension)
        x_label(axis, name)
    for axis in axes.flat[len(dimensions) :]:
        axis.set_axis_off()
    set_floor(axes.flat[0], floor)
    for axis in axes[:, 0]:
        y_label(axis, NAMES[metric])
    seen = [outcome for outcome in ("complete", "pruned") if any(trial.outcome == outcome for trial in known)]
    names = {"complete": "complete: mean", "pruned": "pruned: estimate"}
    handles = [Line2D([], [], color=OUTCOMES[each], marker="o", lw=0, label=names[each]) for each in seen]
    handles.append(_ring_handle(best))
    legend_below(figure, handles)
    return figure


def draw_parallel(
    trials: Sequence[TrialRow], dimensions: Mapping[str, Choice | Range], best: int, *, metric: str
) -> Figure:
    """Draw a line for each trial through the values of its settings to its mean or estimate; darker is better."""
    known = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value or 0.0)
    values = [trial.value or 0.0 for trial in known]
    floor, top = floor_of(values), max(values)
    span = top - floor or 1.0
    figure, axis = single(11.0, 4.4, left=0.9, bottom=0.75, top=0.3, right=0.9)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.grid(False)
    last = len(dimensions)
    for trial in known:
        heights = [position(dimension, trial.params[name]) for name, dimension in dimensions.items()]
        heights.append((max(trial.value or 0.0, floor) - floor) / span)
        is_best = trial.number == best
        color = HELD_OUT if is_best else (0.0, 0.447, 0.698, 0.12 + 0.7 * heights[-1] ** 2)
        axis.plot(range(last + 1), heights, color=color, lw=2.6 if is_best else 1.2, zorder=3 if is_best else 1)
    posts = [[(x, 0.0), (x, 1.0)] for x in range(last + 1)]
    axis.add_collection(LineCollection(posts, colors=INK, linewidths=0.9, zorder=2))
    for x, (name, dimension) in enumerate(dimensions.items()):
        label(axis, name, x, 0, 0, -10, ha="center", va="top", size=9)
        for value in _ticks(dimension):
            place = position(dimension, value)
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8}
            label(axis, setting(value), x, place, 5, 0, va="center", size=8, bbox=box, zorder=5)
    label(axis, NAMES[metric], last, 0, 0, -10, ha="center", va="top", size=9, weight="bold")
    for share in (0.0, 0.5, 1.0):
        label(axis, f"{floor + share * span:.3f}", last, share, 6, 0, va="center", size=8, color="#444444")
    axis.set_xlim(-0.25, last + 0.25)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks([])
    axis.set_yticks([])
    handles = [Line2D([], [], color=TRAIN, lw=1.6, label="a trial (darker is better)")]
    handles.append(Line2D([], [], color=HELD_OUT, lw=2.6, label=f"trial {best}"))
    legend_below(figure, handles)
    return figure


def draw_costs(complete: Sequence[TrialRow], best: int, *, metric: str) -> Figure:
    """Draw means by time, memory and size of the network, with the Pareto front of each."""
    figure = new_figure(11.0, 3.9)
    grid = {"left": 0.075, "right": 0.985, "top": 0.97, "bottom": 0.27, "wspace": 0.1}
    axes = figure.subplots(1, 3, sharey=True, gridspec_kw=grid)
    floor = floor_of([trial.value or 0.0 for trial in complete])
    costs = [
        ("seconds of cross-validation", [t.seconds for t in complete]),
        ("memory of a training step, MiB (predicted)", [(t.memory_bytes or 0) / 2**20 for t in complete]),
        ("parameters of the network", [float(t.n_parameters or 0) for t in complete]),
    ]
    for axis, (name, column) in zip(axes.flat, costs, strict=True):
        style(axis)
        kept = [(cost, trial) for cost, trial in zip(column, complete, strict=True) if cost]
        for cost, trial in kept:
            _point(axis, cost, trial, floor, best=best)
        front = pareto_front([cost for cost, _ in kept], [trial.value or 0.0 for _, trial in kept])
        corners = [(kept[i][0], max(kept[i][1].value or 0.0, floor)) for i in front]
        axis.plot([x for x, _ in corners], [y for _, y in corners], color=RIGHT, lw=1.6, drawstyle="steps-post")
        for i in front[-4:]:
            cost, trial = kept[i]
            label(axis, str(trial.number), cost, max(trial.value or 0.0, floor), 0, 8, ha="center", size=8)
        scale_costs(axis, [cost for cost, _ in kept])
        x_label(axis, name)
    set_floor(axes.flat[0], floor)
    y_label(axes.flat[0], NAMES[metric])
    handles = [Line2D([], [], color=TRAIN, marker="o", lw=0, label="complete trial")]
    handles.append(Line2D([], [], color=RIGHT, lw=1.6, label="Pareto front: no trial is better and cheaper"))
    handles.append(_ring_handle(best))
    legend_below(figure, handles)
    return figure


def draw_distribution(groups: Sequence[tuple[str, Floats]], *, metric: str) -> Figure:
    """Draw the share of images by score for each group, (name, scores), in bins of 0.05."""
    figure, axis = single(9.0, 3.4, left=0.8, bottom=0.95, top=0.1)
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
    x_label(axis, f"{NAMES[metric]} of an image")
    y_label(axis, "share of images")
    legend_below(figure, handles)
    return figure


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the indices of the Pareto-optimal points, cheapest first; of equal points the first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def _point(axis: Axes, x: float, trial: TrialRow, floor: float, *, best: int | None = None) -> None:
    """Draw a trial as a point, or as a triangle on the floor if its value is below; a ring marks the best."""
    value, color = trial.value or 0.0, OUTCOMES[trial.outcome]
    face, marker = (color if trial.outcome == "complete" else "white"), ("v" if value < floor else "o")
    axis.plot([x], [max(value, floor)], marker, color=color, mfc=face, mew=1.3, ms=5.5, zorder=3)
    if trial.number == best:
        axis.plot([x], [value], "o", mfc="none", mec=INK, mew=1.4, ms=11, zorder=4)


def _ring_handle(best: int) -> Line2D:
    return Line2D([], [], marker="o", mfc="none", mec=INK, mew=1.4, ms=10, lw=0, label=f"trial {best}")


def _ticks(dimension: Choice | Range) -> Sequence[Any]:
    """Return the values that an axis of the parallel coordinates names."""
    if isinstance(dimension, Choice):
        return dimension.values
    if dimension.is_int and not dimension.log and dimension.high - dimension.low <= 6:
        return range(int(dimension.low), int(dimension.high) + 1)
    low, high = float(dimension.low), float(dimension.high)
    middle = (low * high) ** 0.5 if dimension.log else (low + high) / 2
    return [dimension.low, float(f"{middle:.2g}"), dimension.high]
