"""Draw the figures of a study's report from typed rows. They have no titles, because the page adds captions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from hpsearch.config.search import Choice, Range
from hpsearch.report.figures import HELD_OUT, INK, NAMES, PALE, RIGHT, TRAIN, label, legend_below, new_figure
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
"""Colour of each outcome. The contrast with white is at least 3 to 1, so that thin marks are visible."""
COSTS: dict[str, Callable[[TrialRow], float | None]] = {
    "seconds of cross-validation": lambda trial: trial.seconds,
    "memory of a training step, MiB (predicted)": lambda trial: (trial.memory_bytes or 0) / 2**20,
    "parameters of the network": lambda trial: trial.n_parameters,
}
"""Maps each axis label to a function that returns this cost of a trial, or None or 0 if it is unknown."""
MIN_PLACES = 8
"""Minimum width of the x axis of the race figure, in trials."""
MAX_RANKED = 25
"""Maximum number of trials in the ranking figure. The ranking table has all trials."""


def draw_answer(estimates: Sequence[tuple[str, Interval]], *, metric: str) -> Figure:
    """Draw one row per estimate (name, interval) with its mean and 95 % interval, the first at the top."""
    figure, axis = _bars([name for name, _ in estimates], 0.42, NAMES[metric])
    for row, ((_, interval), color) in enumerate(zip(estimates, (PALE, TRAIN, RIGHT, HELD_OUT), strict=False)):
        axis.plot([interval.low, interval.high], [row, row], color=color, lw=5, alpha=0.4, solid_capstyle="butt")
        axis.plot(interval.mean, row, "o", color=color, ms=7)
        label(axis, f"{interval.mean:.4f}", (interval.mean, row), (0, 8), ha="center", size=9)
    axis.set_ylim(len(estimates) - 0.5, -0.75)
    return figure


def draw_ranking(complete: Sequence[TrialRow], tied: Sequence[int], cheapest: int, *, metric: str) -> Figure:
    """Draw the mean and 95 % interval of the best complete trials, best first.

    Trials that are tied with the best are coloured. At most MAX_RANKED trials are drawn.
    """
    rows = complete[:MAX_RANKED]
    names = [f"trial {trial.number}" for trial in rows]
    figure, axis = _bars(names, 0.26, f"{NAMES[metric]}, out of fold, with 95 % interval")
    intervals = [trial.statistics.total for trial in rows if trial.statistics is not None]
    floor = floor_of([interval.mean for interval in intervals])
    left = min(interval.low for interval in intervals if interval.mean >= floor)
    for row, (trial, interval) in enumerate(zip(rows, intervals, strict=True)):
        best = "tied with the best" if len(tied) > 1 else "best"
        color, group = (TRAIN, best) if trial.number in tied else (PALE, "worse than the best")
        marker, group = ("D", f"{best}, cheapest") if trial.number == cheapest and len(tied) > 1 else ("o", group)
        # A trial whose training collapsed is drawn at the left end of the axis. The table shows its mean.
        marker = "<" if interval.mean < left else marker
        looks: dict[str, Any] = {"color": color, "lw": 1.6, "marker": marker, "markevery": [1], "label": group}
        axis.plot(np.maximum([interval.low, interval.mean, interval.high], left), [row] * 3, **looks)
    legend_below(figure)
    return figure


def draw_race(trials: Sequence[TrialRow], ranking: Sequence[int], n_folds: int, *, metric: str) -> Figure:
    """Plot the score of each trial and, below it, the number of trained folds against the trial number.

    The upper axes show the mean or estimate of each trial, and the best mean so far. `ranking` contains the numbers
    of the trials that can win, best first.
    """
    figure, ((above,), (below,)) = new_figure(11.0, 5.6, nrows=2, sharex=True, height_ratios=[3, 2])
    above.set_ylabel(NAMES[metric])
    below.set_ylabel("folds trained")
    below.set_xlabel("trial")
    values = _draw_points(above, [(trial.number, trial) for trial in trials])
    if not values:
        above.text(0.5, 0.5, "no trial has a mean or an estimate", transform=above.transAxes, ha="center", color=PALE)
    for trial in trials:
        color, height = OUTCOMES[trial.outcome], sum(trial.epochs) / trial.n_epochs
        below.bar(trial.number, height, lw=0, color=color, label=trial.outcome)
        if not any(trial.epochs) and trial.outcome != "open":
            below.plot(trial.number, 0.08 * n_folds, "x", color=color, ms=5)
    if ranking:
        steps = sorted(ranking)
        best = [values[next(number for number in ranking if number <= step)] for step in steps]
        corners = ([*steps, trials[-1].number], [*best, best[-1]])
        above.plot(*corners, color=INK, lw=1.2, drawstyle="steps-post", zorder=1, label="best mean so far")
    below.set_ylim(0, n_folds * 1.04)
    below.locator_params(integer=True, min_n_ticks=1)
    first, last = trials[0].number, trials[-1].number
    # Without a minimum width, the bars of only a few trials would fill the figure.
    below.set_xlim(first - 0.6, max(last, first + MIN_PLACES - 1) + 0.6)
    legend_below(figure)
    return figure


def draw_importances(importances: Mapping[str, float]) -> Figure:
    """Draw the share of the variance between trials that each setting explains, in the order of `importances`."""
    figure, axis = _bars(list(importances), 0.34, "share of the variance between trials")
    bars = axis.barh(range(len(importances)), list(importances.values()), height=0.62, color=TRAIN, lw=0)
    axis.bar_label(bars, [f"{share:.0%}" for share in importances.values()], padding=6, size=9)
    axis.set_xlim(0, max(0.01, *importances.values()) * 1.12)
    return figure


def draw_slices(
    trials: Sequence[TrialRow], dimensions: Mapping[str, Choice | Range], best: int, *, metric: str
) -> Figure:
    """Draw one panel per searched setting: the mean or estimate of each trial against the value of the setting.

    A ring marks the trial `best`.
    """
    n_columns = min(3, len(dimensions))
    n_rows = -(-len(dimensions) // n_columns)
    figure, axes = new_figure(11.0, 0.5 + 2.8 * n_rows, nrows=n_rows, ncols=n_columns, sharey=True)
    for axis, (name, dimension) in zip(axes.flat, dimensions.items(), strict=False):
        axis.set_xlabel(name)
        places = [trial.params[name] for trial in trials]
        if isinstance(dimension, Choice):
            places = [dimension.values.index(dimension.key(value)) for value in places]
            axis.set_xticks(range(len(dimension.values)), map(setting, dimension.values))
            axis.set_xlim(-0.5, len(dimension.values) - 0.5)
        elif dimension.log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        else:
            axis.locator_params(axis="x", nbins=6, integer=dimension.is_int, min_n_ticks=1)
        if isinstance(dimension, Range):
            axis.update_datalim([(dimension.low, 0), (dimension.high, 0)], updatey=False)
        _draw_points(axis, [*zip(places, trials, strict=True)], best)
    for axis in axes.flat[len(dimensions) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(NAMES[metric])
    legend_below(figure)
    return figure


def draw_costs(complete: Sequence[TrialRow], best: int, *, metric: str) -> Figure:
    """Plot the mean of each complete trial against its time, memory and number of parameters, with Pareto fronts."""
    figure, axes = new_figure(11.0, 3.9, ncols=3, sharey=True)
    axes[0, 0].set_ylabel(NAMES[metric])
    for axis, (name, cost_of) in zip(axes.flat, COSTS.items(), strict=True):
        points = [(cost, trial) for trial in complete if (cost := cost_of(trial))]
        heights = _draw_points(axis, points, best)
        front = [points[i] for i in pareto_front([x for x, _ in points], [trial.value or 0.0 for _, trial in points])]
        corners = [(cost, heights[trial.number]) for cost, trial in front]
        looks: dict[str, Any] = {"drawstyle": "steps-post", "label": "Pareto front: no trial is better and cheaper"}
        axis.plot([x for x, _ in corners], [y for _, y in corners], color=RIGHT, lw=1.6, **looks)
        for (_, trial), corner in [*zip(front, corners, strict=True)][-4:]:
            label(axis, str(trial.number), corner, (0, 8), ha="center", size=8)
        axis.set_xlabel(name)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.minorticks_off()
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_below(figure)
    return figure


def draw_distribution(groups: Sequence[tuple[str, Floats]], *, metric: str) -> Figure:
    """Draw a histogram of the image scores of each group (name, scores), in bins of 0.05, with the mean."""
    figure, ((axis,),) = new_figure(9.0, 3.4)
    for (name, scores), color in zip(groups, (TRAIN, HELD_OUT), strict=False):
        shares = np.full(len(scores), 1 / len(scores))
        looks: dict[str, Any] = {"histtype": "stepfilled", "fc": (color, 0.18), "ec": color, "lw": 1.8}
        mean = float(np.mean(scores))
        title = f"{name} (dashed: mean {mean:.3f})"
        axis.hist(scores, np.linspace(0, 1, 21).tolist(), weights=shares, label=title, **looks)
        axis.axvline(mean, color=color, lw=1.2, ls="--")
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"{NAMES[metric]} of an image")
    axis.set_ylabel("share of images")
    legend_below(figure)
    return figure


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the indices of the Pareto-optimal points, cheapest first. Only the first of equal points is included."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def floor_of(values: Sequence[float]) -> float:
    """Return a lower limit for the score axis of a plot, so that a few very low scores do not compress all others."""
    if not values:
        return 0.0
    low, upper, high = min(values), float(np.quantile(values, 0.75)), max(values)
    return max(low, high - 5 * (high - upper)) if high > upper else low - 0.01


def _bars(names: Sequence[str], inches: float, x_label: str) -> tuple[Figure, Axes]:
    """Return a figure and its axes with one labelled row per name, the first at the top. Rows are `inches` high."""
    figure, ((axis,),) = new_figure(9.0, 0.9 + inches * len(names))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(x_label)
    return figure, axis


def _draw_points(axis: Axes, trials: Sequence[tuple[float, TrialRow]], best: int | None = None) -> dict[int, float]:
    """Draw one point per (x, trial) pair: the mean or estimate of the trial. Return the y values by trial number.

    A trial without a value is left out. A value below the lower limit (`floor_of`) is drawn as a triangle at this
    limit. A ring marks the trial `best`.
    """
    values = {trial.number: trial.value for _, trial in trials if trial.value is not None}
    floor = floor_of(list(values.values()))
    heights = {number: max(value, floor) for number, value in values.items()}
    for x, trial in trials:
        if trial.number in values:
            color, kind = OUTCOMES[trial.outcome], "mean" if trial.outcome == "complete" else "estimate"
            looks: dict[str, Any] = {"mfc": color if kind == "mean" else "white", "mew": 1.3, "ms": 5.5, "zorder": 3}
            text = "" if best is None else f"{trial.outcome}: {kind}"
            marker = "v" if values[trial.number] < floor else "o"
            axis.plot(x, heights[trial.number], marker, color=color, label=text, **looks)
        if trial.number == best:
            looks = {"mfc": "none", "mec": INK, "mew": 1.4, "ms": 11, "zorder": 4, "label": f"trial {best}"}
            axis.plot(x, heights[trial.number], "o", **looks)
    return heights
