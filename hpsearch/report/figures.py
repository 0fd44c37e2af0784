"""Draw the figures of a trial or a final, learning curves and example images, and write figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hpsearch.report.axes import (
    EXTRA,
    FONT,
    HELD_OUT,
    INK,
    MISSED,
    NAMES,
    PALE,
    RIGHT,
    TRAIN,
    legend_below,
    literally,
    new_figure,
    style,
)
from hpsearch.report.trial_rows import CURVES, Case, CurvePoint


def draw_curves(points: Sequence[CurvePoint], *, title: str) -> Figure:
    """Draw loss, Dice, Jaccard and accuracy over the epochs, on training and held-out images together.

    Thin lines are single fits, thick ones the mean over the fits that got furthest. The shaded gap between the means
    is how much better training is; its size after the last epoch is written beside it. A dotted line marks the best
    epoch on held-out images, if that is not the last one.
    """
    figure = new_figure(11.0, 7.2, title)
    # Leave room to the right of each column for the label with the size of its gap.
    grid = {"left": 0.06, "right": 0.92, "top": 0.88, "bottom": 0.13, "wspace": 0.3, "hspace": 0.2}
    axes = figure.subplots(2, 2, sharex=True, gridspec_kw=grid)
    for number, (axis, score) in enumerate(zip(axes.flat, CURVES, strict=True)):
        _draw_curve(axis, [point for point in points if point.score == score], score)
        if number >= 2:
            axis.set_xlabel("epoch", font=FONT, color=INK)
    handles: list[Any] = [Line2D([], [], color=TRAIN, lw=2.2, label="training")]
    if any(point.held_out is not None for point in points):
        handles += [
            Line2D([], [], color=HELD_OUT, lw=2.2, label="held out"),
            Patch(color=HELD_OUT, alpha=0.16, lw=0, label="gap: training is better"),
            Line2D([], [], color=PALE, lw=1.2, ls=":", label="best epoch, held out"),
        ]
    legend_below(figure, handles)
    return figure


def draw_panels(cases: Sequence[Case], *, metric: str, title: str) -> Figure:
    """Draw a row for each case: image, mask, prediction, and both over the image. All images have one size."""
    if not cases:
        figure = new_figure(8.0, 2.0, title)
        literally(figure.text(0.02, 0.45, "no examples were kept", color=PALE))
        return figure
    image_height, image_width = cases[0].mask.shape
    cell = 6.2 / 4
    row = cell * image_height / image_width
    left, top, bottom = 1.7, 0.85, 0.5
    height = top + row * len(cases) + bottom
    figure = new_figure(8.0, height, title)
    # One picture in one axes is ten times as fast as an axes for each view.
    axis = figure.add_axes((left / 8.0, bottom / height, 4 * cell / 8.0, row * len(cases) / height))
    axis.set_axis_off()
    views = [[_framed(view) for view in _views(case)] for case in cases]
    picture = np.concatenate([np.concatenate(each, axis=1) for each in views])
    axis.imshow(picture, aspect="auto", interpolation="nearest" if image_width < 200 else "auto")
    for number, case in enumerate(cases):
        middle = bottom + row * (len(cases) - number - 0.5)
        score = f"{NAMES.get(metric, metric)} {case.score:.3f}\n{_shortened(case.image_id)}"
        literally(figure.text(0.02, (middle + 0.16) / height, case.rank, weight="bold", color=INK))
        literally(figure.text(0.02, (middle + 0.08) / height, score, size=8.5, color=INK, va="top"))
    for number, name in enumerate(("image", "mask", "prediction", "overlay")):
        x, y = (left + cell * (number + 0.5)) / 8.0, 1 - (top - 0.08) / height
        literally(figure.text(x, y, name, ha="center", size=10, color=INK))
    labels = {RIGHT: "true positive", MISSED: "missed (false negative)", EXTRA: "false positive"}
    legend_below(figure, [Patch(color=color, lw=0, label=label) for color, label in labels.items()])
    return figure


def to_png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Return the figure as a PNG file; the same rows give the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "hpsearch"})
    return buffer.getvalue()


def to_pdf(figure: Figure) -> bytes:
    """Return the figure as a PDF file with vector graphics; the same rows give the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"Creator": "hpsearch", "Producer": None, "CreationDate": None})
    return buffer.getvalue()


def _draw_curve(axis: Axes, points: Sequence[CurvePoint], score: str) -> None:
    style(axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    literally(axis.set_title(NAMES[score], loc="left", size=11, color=INK))
    means = {}
    for which, color in (("train", TRAIN), ("held_out", HELD_OUT)):
        fits = _lines(points, which)
        for epochs, values in fits:
            axis.plot(epochs, values, color=color, lw=0.8, alpha=0.35)
        if fits:
            n_epochs = max(len(epochs) for epochs, _ in fits)
            furthest = [values for epochs, values in fits if len(epochs) == n_epochs]
            means[which] = np.mean(furthest, axis=0)
            epochs = next(epochs for epochs, _ in fits if len(epochs) == n_epochs)
            # A single epoch is a point, which a line would not show.
            axis.plot(epochs, means[which], color=color, lw=2.2, marker="o" if n_epochs == 1 else None)
    if len(means) == 2:
        _mark_gap(axis, epochs, means["train"], means["held_out"], score)


def _mark_gap(
    axis: Axes,
    epochs: npt.NDArray[np.int64],
    train: npt.NDArray[np.float64],
    held_out: npt.NDArray[np.float64],
    score: str,
) -> None:
    gaps = held_out - train if score == "loss" else train - held_out
    axis.fill_between(epochs, train, held_out, where=(gaps > 0).tolist(), color=HELD_OUT, alpha=0.16, lw=0)
    # In axis coordinates the text stays beside the curves whatever their range.
    middle = (train[-1] + held_out[-1]) / 2
    literally(
        axis.annotate(
            f"gap\n{gaps[-1]:+.3f}",
            xy=(1.0, middle),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=9,
            color=HELD_OUT if gaps[-1] > 0 else PALE,
        )
    )
    best = int(np.argmin(held_out) if score == "loss" else np.argmax(held_out))
    if best < len(epochs) - 1:
        axis.axvline(float(epochs[best]), color=PALE, lw=1.2, ls=":")


def _lines(points: Sequence[CurvePoint], which: str) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Return epochs and values of each fit that has values of this kind."""
    fits: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        value = getattr(point, which)
        if value is not None:
            fits.setdefault(point.fit, []).append((point.epoch, value))
    return [
        (np.array([epoch for epoch, _ in sorted(fit)]), np.array([value for _, value in sorted(fit)]))
        for fit in fits.values()
    ]


def _views(case: Case) -> list[npt.NDArray[np.uint8]]:
    """Return the four images of a row, each (H, W, 3)."""
    mask, pred = (np.repeat(np.where(each, 255, 0)[..., None], 3, axis=2) for each in (case.mask, case.pred))
    return [case.image, mask.astype(np.uint8), pred.astype(np.uint8), _overlay(case)]


def _framed(view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Add a white margin that separates the view from its neighbours."""
    margin = max(1, view.shape[1] // 40)
    return np.pad(view, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)


def _overlay(case: Case) -> npt.NDArray[np.uint8]:
    """Colour true positives, false negatives and false positives over the image."""
    result = case.image.astype(np.float64)
    regions = {RIGHT: case.mask & case.pred, MISSED: case.mask & ~case.pred, EXTRA: ~case.mask & case.pred}
    for color, region in regions.items():
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.float64)
        weight = 0.3 if color == RIGHT else 0.75
        result[region] = (1 - weight) * result[region] + weight * rgb
    return result.round().astype(np.uint8)


def _shortened(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
