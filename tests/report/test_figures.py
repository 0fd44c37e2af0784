"""hpsearch/report/figures.py: rows in, figure out, the same from any thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from hpsearch.report import figures
from hpsearch.report.trial_rows import Case
from hpsearch.training.rows import EpochRow, Scores


def epoch_row(epoch: int, train: float, held_out: float | None) -> EpochRow:
    """The same value for every score."""
    scores = [None if value is None else Scores(value, value, value, value) for value in (train, held_out)]
    cost = {"lr": 0.1, "train_s": 1.0, "eval_s": 0.5, "images_per_s": 10.0, "peak_bytes": 0}
    return EpochRow(epoch=epoch, time=0.0, train=scores[0], held_out=scores[1], **cost)  # type: ignore[arg-type]


def curves(
    held_out: Sequence[float | None], train: Sequence[float] = (0.5, 0.7, 0.9), n_fits: int = 1
) -> list[list[EpochRow]]:
    """The epochs of every fit; fit i has i more than the first."""
    return [
        [
            epoch_row(epoch, train[epoch - 1] + fit, None if value is None else value + fit)
            for epoch, value in enumerate(held_out, start=1)
        ]
        for fit in range(n_fits)
    ]


def axis_of(figure: Figure, name: str) -> Axes:
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == name]
    return axis


def thick_lines(axis: Axes) -> dict[str, list[float]]:
    """Colour and values of the means."""
    return {str(line.get_color()): list(line.get_ydata()) for line in axis.lines if line.get_linewidth() > 2}  # type: ignore[arg-type]


def texts(figure: Figure) -> list[str]:
    """Return all texts of a figure that are not empty."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def case(mask: object, pred: object, rank: str = "best", name: str = "ISIC_1") -> Case:
    mask, pred = np.array(mask, bool), np.array(pred, bool)
    image = np.zeros((*mask.shape, 3), np.uint8)
    return Case(rank=rank, image_id=name, score=0.5, image=image, mask=mask, pred=pred)  # type: ignore[arg-type]


def picture(figure: Figure) -> np.ndarray:
    """The one image of a panels figure."""
    return np.asarray(figure.axes[0].images[0].get_array())


def test_training_and_held_out_are_drawn_together_as_means_over_the_fits() -> None:
    figure = figures.draw_curves(curves((0.4, 0.6, 0.5), n_fits=3), title="t")
    lines = thick_lines(axis_of(figure, "Dice"))
    assert lines[figures.TRAIN] == pytest.approx([1.5, 1.7, 1.9])
    assert lines[figures.HELD_OUT] == pytest.approx([1.4, 1.6, 1.5])


def test_a_fit_that_was_cut_short_does_not_bend_the_mean() -> None:
    fits = [*curves((0.4, 0.6, 0.5)), [epoch_row(1, 9.0, 9.0)]]
    lines = thick_lines(axis_of(figures.draw_curves(fits, title="t"), "Dice"))
    assert lines[figures.HELD_OUT] == pytest.approx([0.4, 0.6, 0.5])


@pytest.mark.parametrize(("name", "gap"), [("Dice", "+0.400"), ("Jaccard", "+0.400"), ("Loss", "-0.400")])
def test_the_gap_is_how_far_training_is_ahead_after_the_last_epoch(name: str, gap: str) -> None:
    # The same numbers: training ahead in a score is training behind in a loss.
    axis = axis_of(figures.draw_curves(curves((0.4, 0.6, 0.5)), title="t"), name)
    assert [text.get_text() for text in axis.texts] == [f"gap\n{gap}"]


def test_the_best_held_out_epoch_is_marked_where_it_is_not_the_last() -> None:
    overfitted = axis_of(figures.draw_curves(curves((0.4, 0.6, 0.5)), title="t"), "Dice")
    assert [list(line.get_xdata()) for line in overfitted.lines if line.get_linestyle() == ":"] == [[2.0, 2.0]]
    still_better = axis_of(figures.draw_curves(curves((0.4, 0.5, 0.6)), title="t"), "Dice")
    assert not [line for line in still_better.lines if line.get_linestyle() == ":"]


def test_a_fit_with_nothing_held_out_has_no_gap() -> None:
    figure = figures.draw_curves(curves((None, None, None)), title="t")
    assert list(thick_lines(axis_of(figure, "Loss"))) == [figures.TRAIN]
    assert not axis_of(figure, "Loss").texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training"]


def test_one_epoch_is_a_visible_point() -> None:
    figure = figures.draw_curves(curves((0.4,)), title="t")
    assert all(line.get_marker() == "o" for line in axis_of(figure, "Dice").lines if line.get_linewidth() > 2)
    figures.to_bytes(figure)


def test_panels_color_what_was_found_missed_and_invented() -> None:
    mask = np.zeros((40, 40), bool)
    mask[:20] = True
    pred = np.zeros((40, 40), bool)
    pred[:, :20] = True
    view = picture(figures.draw_panels([case(mask, pred)], metric="dice", title="t"))
    both = view[:, 3 * view.shape[1] // 4 :]
    # On a black image a region has the share of its colour that covers it.
    height, width = both.shape[:2]
    seen = {
        name: to_hex(both[int(y * height), int(x * width)] / 255)
        for name, (y, x) in {
            "found": (0.25, 0.25),
            "missed": (0.25, 0.75),
            "invented": (0.75, 0.25),
            "right": (0.75, 0.75),
        }.items()
    }
    assert seen["right"] == "#000000"
    for name, color, share in (
        ("found", figures.RIGHT, 0.3),
        ("missed", figures.MISSED, 0.75),
        ("invented", figures.EXTRA, 0.75),
    ):
        expected = [round(int(color[i : i + 2], 16) * share) for i in (1, 3, 5)]
        assert [int(seen[name][i : i + 2], 16) for i in (1, 3, 5)] == expected


def test_panels_have_a_row_for_each_case_with_rank_score_and_name() -> None:
    cases = [case(np.eye(8), np.eye(8), rank, f"ISIC_{rank}") for rank in ("best", "median", "worst")]
    figure = figures.draw_panels(cases, metric="jaccard", title="a title")
    assert "a title" in texts(figure)
    for rank in ("best", "median", "worst"):
        assert f"{rank}\nJaccard 0.500\nISIC_{rank}" in texts(figure)
    height, width = picture(figure).shape[:2]
    assert height / width == pytest.approx(3 / 4)


def test_names_from_outside_are_taken_literally() -> None:
    # As mathematics the first would be an error, and for the others the font has no letter.
    title = r"$\frac{1$ 皮膚 <b>"
    figure = figures.draw_panels([case(np.eye(8), np.eye(8), name="$x^$" + "y" * 50)], metric="dice", title=title)
    assert r"$\frac{1$ �� <b>" in texts(figure)
    assert figures.to_bytes(figure).startswith(b"\x89PNG")


def test_the_same_rows_give_the_same_bytes_in_any_thread() -> None:
    points = curves((0.4, 0.6, 0.5), n_fits=2)
    expected = figures.to_bytes(figures.draw_curves(points, title="t"))
    drawn: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: drawn.append(figures.to_bytes(figures.draw_curves(points, title="t"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [expected] * 4


def test_drawing_needs_no_pyplot() -> None:
    code = (
        "import sys; from hpsearch.report import figures; "
        "figures.to_bytes(figures.draw_curves([], title='t')); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
