"""Draw the figures of a trial or a retrained model. Defines the colours, axes and file formats of all figures.

This module uses neither pyplot nor rcParams, so figures can be drawn in any thread.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from hpsearch.report.formats import SCORES
from hpsearch.report.trial_rows import CURVES, Case
from hpsearch.stats.intervals import Floats
from hpsearch.training.rows import EpochRow

# Colours from the palette of Okabe and Ito, which people with colour blindness can distinguish.
TRAIN, HELD_OUT = "#0072B2", "#D55E00"
RIGHT, MISSED, EXTRA = "#009E73", "#E69F00", "#CC79A7"
INK, PALE = "#222222", "#6a6a6a"
FONT = "DejaVu Sans"
"""Font of all figures. Matplotlib includes it, so that figures look the same on every machine."""
NAMES = {"loss": "Loss", **SCORES}


def new_figure(
    width: float, height: float, *, title: str = "", margins: dict[str, float] | None = None, **options: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """Return a figure and its array of axes, (rows, columns). `width` and `height` are in inches.

    The axes have a grid, and no spines at the top and right. `margins` places the axes, with the names of
    `SubplotParams`. Without it, the layout is computed from the texts, which takes a third of the drawing time.
    `options` are passed to `Figure.subplots`, for example `nrows`.
    """
    layout = None if margins else ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    if title:
        figure.suptitle(literal(title), x=0.02, ha="left", size=13, weight="bold", color=INK)
    axes = figure.subplots(squeeze=False, gridspec_kw=margins, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, axes


def label(axis: Axes, text: str, point: tuple[float, float], moved: tuple[float, float], **more: Any) -> None:
    """Write text beside the data point `point`, offset by `moved` points. `more` goes to `annotate`."""
    axis.annotate(text, point, moved, textcoords="offset points", annotation_clip=False, **more)


def legend_below(figure: Figure) -> None:
    """Add a one-line legend below the figure, with one entry for each distinct label in its axes."""
    handles = [handle for axis in figure.axes for handle in axis.get_legend_handles_labels()[0]]
    found = {str(handle.get_label()): handle for handle in handles}
    figure.legend(found.values(), found.keys(), ncols=len(found), loc="outside lower left", frameon=False, fontsize=9)


def literal(text: str) -> str:
    """Replace characters that the font does not have."""
    font = font_manager.get_font(font_manager.findfont(FONT))
    return "".join(c if c.isspace() or font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text)


def to_bytes(figure: Figure, file_format: str = "png", *, dpi: int = 110) -> bytes:
    """Encode a figure as PNG, or as PDF with vector graphics. Equal figures give byte-identical files."""
    for text in figure.findobj(Text):
        # Names given by users may contain dollar signs, which would start a formula.
        text.set_parse_math(False)
        text.set_fontfamily(FONT)
    pdf = {"Creator": "hpsearch", "Producer": None, "CreationDate": None}
    metadata = {"Software": "hpsearch"} if file_format == "png" else pdf
    buffer = BytesIO()
    if file_format == "png":
        # Unlike `savefig`, this draws the figure only once.
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(buffer, metadata=metadata)  # type: ignore[no-untyped-call]
    else:
        figure.savefig(buffer, format=file_format, metadata=metadata)
    # Keep the layout for the next file of this figure.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def draw_curves(fits: Sequence[Sequence[EpochRow]], *, title: str) -> Figure:
    """Plot loss, Dice, Jaccard and accuracy against the epoch, for training and held-out images in the same axes.

    Thin lines show single fits. Thick lines show the mean over the fits with the most epochs. The gap between the
    training and the held-out mean is shaded where training is better, and its size after the last epoch is written
    beside it. A dotted line marks the best epoch on held-out images unless it is the last epoch.
    """
    # There is room at the right of each column for the size of the gap.
    margins = {"left": 0.06, "right": 0.93, "bottom": 0.12, "top": 0.89, "wspace": 0.24, "hspace": 0.16}
    figure, axes = new_figure(11.0, 7.2, title=title, margins=margins, nrows=2, ncols=2, sharex=True)
    for axis, score in zip(axes.flat, CURVES, strict=True):
        axis.set_title(NAMES[score], loc="left", size=11)
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        train = _draw_fits(axis, fits, "train", score, color=TRAIN, label="training")
        held_out = _draw_fits(axis, fits, "held_out", score, color=HELD_OUT, label="held out")
        if train is not None and held_out is not None:
            _mark_gap(axis, *train, held_out[1], score)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    legend_below(figure)
    return figure


def _draw_fits(
    axis: Axes, fits: Sequence[Sequence[EpochRow]], which: str, score: str, *, color: str, label: str
) -> tuple[Floats, Floats] | None:
    """Plot a score of every fit, and its mean over the fits. Return (epochs, mean), or None if no fit has the score.

    `which` is `train` or `held_out`.
    """
    found = [
        [(row.epoch, getattr(scores, score)) for row in rows if (scores := getattr(row, which))] for rows in fits
    ]
    lines = [np.array(line, np.float64).T for line in found if line]
    if not lines:
        return None
    for epochs, values in lines:
        axis.plot(epochs, values, color=color, lw=0.8, alpha=0.35)
    n_epochs = max(line.shape[1] for line in lines)
    epochs, mean = np.mean([line for line in lines if line.shape[1] == n_epochs], axis=0)
    # A line with a single point is invisible, so draw a marker if there is only one epoch.
    axis.plot(epochs, mean, color=color, lw=2.2, marker="o" if n_epochs == 1 else None, label=label)
    return epochs, mean


def _mark_gap(axis: Axes, epochs: Floats, train: Floats, held_out: Floats, score: str) -> None:
    sign = -1 if score == "loss" else 1
    gaps = sign * (train - held_out)
    shade: dict[str, Any] = {"color": HELD_OUT, "alpha": 0.16, "lw": 0, "label": "gap: training is better"}
    axis.fill_between(epochs, train, held_out, where=(gaps > 0).tolist(), **shade)
    # x is in axes coordinates, so the text stays to the right of the axes for any number of epochs.
    middle = (1.0, (train[-1] + held_out[-1]) / 2)
    looks = {"size": 9, "color": HELD_OUT if gaps[-1] > 0 else PALE, "va": "center"}
    label(axis, f"gap\n{gaps[-1]:+.3f}", middle, (6, 0), xycoords=("axes fraction", "data"), **looks)
    best = int(np.argmax(sign * held_out))
    if best < len(epochs) - 1:
        axis.axvline(float(epochs[best]), color=PALE, lw=1.2, ls=":", label="best epoch, held out")


def draw_panels(cases: Sequence[Case], *, metric: str, title: str) -> Figure:
    """Draw one row per case: image, mask, prediction and overlay. All images must have the same size."""
    # Drawing all pictures as one image is ten times faster than using one axes per picture.
    picture = np.concatenate([np.concatenate(_views(case), axis=1) for case in cases])
    height, width = picture.shape[0] / len(cases), picture.shape[1] / 4
    inches = 1.35 + 6.2 / 4 * len(cases) * height / width
    margins = {"left": 1.7 / 8.0, "right": 7.9 / 8.0, "bottom": 0.5 / inches, "top": 1 - 0.85 / inches}
    figure, ((axis,),) = new_figure(8.0, inches, title=title, margins=margins)
    axis.grid(False)
    axis.imshow(picture, interpolation="nearest" if width < 200 else "auto")
    axis.xaxis.tick_top()
    axis.set_xticks(width * (np.arange(4) + 0.5), ["image", "mask", "prediction", "overlay"])
    names = [f"{case.rank}\n{NAMES[metric]} {case.score:.3f}\n{literal(case.image_id):.20}" for case in cases]
    axis.set_yticks(height * (np.arange(len(cases)) + 0.5), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for color, text in ((RIGHT, "true positive"), (MISSED, "missed (false negative)"), (EXTRA, "false positive")):
        axis.scatter([], [], color=color, marker="s", label=text)
    legend_below(figure)
    return figure


def _views(case: Case) -> list[npt.NDArray[np.uint8]]:
    """Return the pictures of a case: image, mask, prediction and overlay, each (H, W, 3) uint8 plus a white margin.

    The overlay shows true positives, false negatives and false positives in different colours on the image.
    """
    overlay = case.image.astype(np.float64)
    regions = {RIGHT: case.mask & case.pred, MISSED: case.mask & ~case.pred, EXTRA: ~case.mask & case.pred}
    for color, region in regions.items():
        weight = 0.3 if color == RIGHT else 0.75
        overlay[region] = (1 - weight) * overlay[region] + weight * np.array(list(bytes.fromhex(color[1:])))
    mask, pred = (np.repeat(np.where(each, 255, 0)[..., None], 3, axis=2) for each in (case.mask, case.pred))
    margin = max(1, case.mask.shape[1] // 40)
    padding = ((margin, margin), (margin, margin), (0, 0))
    views = (case.image, mask, pred, overlay.round())
    return [np.pad(view.astype(np.uint8), padding, constant_values=255) for view in views]
