"""hpsearch/report/study_figures.py: the lines of a figure are what the rows say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from hpsearch.report.figures import INK
from hpsearch.report.rows import StudyRows, study_rows
from hpsearch.report.study_figures import draw_race, floor_of, pareto_front
from tests.recorded import FakeStudy


def best_so_far(rows: StudyRows) -> list[tuple[float, float]]:
    """Corners of the line of the best mean so far."""
    figure = draw_race(rows.trials, rows.standing.ranking, rows.record.n_folds, metric=rows.metric)
    (line,) = (line for line in figure.axes[0].lines if line.get_color() == INK)
    return list(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), strict=True))


def test_the_best_mean_so_far_starts_with_trial_0_and_ends_with_the_winner(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.confirm=2",))
    for rate in (0.005, 0.05, 0.03):
        study.trial(**{"train.lr": rate, "unet.depth": 4})
    study.trial("pruned")
    # Trials 1 and 2 are replicated; trial 1 has the best first fits, trial 2 the best mean over both.
    study.confirm(1, 2, gains={1: -0.2, 2: 0.0})
    rows = study_rows(study.record)
    values = rows.standing.values
    assert rows.standing.winner == 2
    assert values[1] < rows.trials[0].value < values[2]  # type: ignore[operator]
    # A replicated trial ranks above one with first fits only.
    assert best_so_far(rows) == [
        (0, rows.trials[0].value),
        (1, rows.trials[1].value),
        (2, rows.trials[2].value),
        (3, rows.trials[2].value),
    ]


def test_a_worse_trial_does_not_lower_the_best_mean_so_far(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial(**{"train.lr": 0.002})
    rows = study_rows(study.record)
    lead = rows.trials[0].value
    assert best_so_far(rows) == [(0, lead), (1, lead), (1, lead)]
    only_pruned = dataclasses.replace(rows.trials[0], outcome="pruned")
    figure = draw_race([only_pruned], (), rows.record.n_folds, metric=rows.metric)
    assert not [line for line in figure.axes[0].lines if line.get_color() == INK]


def test_no_point_of_the_pareto_front_is_beaten_and_every_other_is() -> None:
    rng = np.random.default_rng(0)
    costs, values = rng.integers(1, 9, 40).tolist(), rng.integers(1, 9, 40).tolist()
    front = pareto_front(costs, values)

    def is_beaten(i: int) -> bool:
        return any(
            costs[j] <= costs[i] and values[j] >= values[i] and (costs[j], values[j]) != (costs[i], values[i])
            for j in range(40)
        )

    assert not any(is_beaten(i) for i in front)
    corners = {(costs[i], values[i]) for i in front}
    assert all(is_beaten(i) or (costs[i], values[i]) in corners for i in range(40))
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_collapsed_trials_lie_below_the_floor_and_good_ones_above_it() -> None:
    good = [0.80, 0.81, 0.82, 0.83]
    assert 0.1 < floor_of([0.1, *good]) <= 0.80
    assert floor_of(good) == 0.80
    assert floor_of([0.8, 0.8]) < 0.8
    assert floor_of([]) == 0.0
