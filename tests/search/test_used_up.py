"""Equal configurations are one: a search ends when it has had all, and no copy loses against its twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hpsearch import config as configs
from hpsearch.cli.progress import StudyProgress
from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.errors import StudyError
from hpsearch.search import pruners
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.pruners.none import NoPruner
from hpsearch.search.racing import FoldOrder, TrialScores
from hpsearch.search.status import study_status
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision
from hpsearch.tracking.runs import study_run
from tests.search.studies import SETTINGS, run, write_tiny_dataset


def finite(dataset: Path, *overrides: str) -> StudyConfig:
    """Six trials of a space of two configurations."""
    given = [each for each in SETTINGS if not each.startswith("search.")]
    given += ["train.epochs=1", "study.trials=6", "study.pruner=none", "search.unet.depth=[1, 2]"]
    return configs.load(None, [f'data.root="{dataset}"', *given, *overrides])


class _Heard(NullCallback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.usefixtures("in_process")
def test_a_search_space_that_is_used_up_ends_the_search_and_the_refits_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finite(write_tiny_dataset(tmp_path), "study.confirm=2")
    heard = _Heard()
    summary = run(tmp_path, config, callback=heard)
    record = summary.record
    assert [trial.params for trial in record.trials()] == [{"unet.depth": 1}, {"unet.depth": 2}]
    message = "the search space is used up: every configuration has been tried, so the search ends with 2 of 6 trials"
    assert message in heard.texts
    assert record.standing().confirmed
    status = study_status(record.paths.project, record.name)
    assert status.is_over
    assert study_run(record, record.trials(), record.standing()).status == "FINISHED"
    StudyProgress(record.name, record.paths.project).summarise(summary)
    assert "2 of 6 trials done. Next:" in capsys.readouterr().out
    again = run(tmp_path, config, callback=_Heard())
    assert len(again.record.trials()) == 2


@pytest.mark.usefixtures("in_process")
def test_a_finite_space_without_a_feasible_configuration_ends_with_a_reason(tmp_path: Path) -> None:
    config = finite(write_tiny_dataset(tmp_path), "unet.depth=6", "search.unet.depth=[6, 7]")
    with pytest.raises(StudyError, match="every configuration is infeasible, the last because"):
        run(tmp_path, config)


class _Drops(NoPruner):
    """Drops every trial that has a full one to lose against."""

    folds: FoldOrder = "in order"

    def should_prune(  # type: ignore[override]
        self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds
    ) -> PruneDecision | None:
        if not any(other.is_full(folds.k) for other in others):
            return None
        return PruneDecision(drop=True, estimate=0.1, fold=candidate.latest, epoch=1, reason="orphaned")


@pytest.mark.usefixtures("in_process")
def test_a_copy_does_not_lose_against_its_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruners, "make_pruner", lambda config: _Drops())
    # Studies of older versions may have a configuration twice.
    monkeypatch.setattr(StudyRecord, "n_unused", lambda self, trials: None)
    config = finite(write_tiny_dataset(tmp_path), "study.trials=5", "study.sampler=random")
    trials = run(tmp_path, config).record.trials()
    assert sum(trial.params["unet.depth"] == 1 for trial in trials) > 1
    outcomes = {1: "complete", 2: "pruned"}
    assert [trial.outcome for trial in trials] == [outcomes[trial.params["unet.depth"]] for trial in trials]
