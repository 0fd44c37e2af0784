"""Check pruning decisions: complete the best pruned trials in a copy of a study, without pruning.

    python benchmarks/dropped.py --study OUT/studies/NAME --out COPY         the five with the highest estimates
    python benchmarks/dropped.py --study OUT/studies/NAME --out COPY -n 10   the ten with the highest estimates

A trial keeps its number and therefore its seeds. Its finished folds are reused, and the other folds are fitted as
they would have been in the study. After a stop, the same command continues. Each row of the table shows when the
trial was pruned and compared with which incumbent, its estimate, its actual value, and how far this value is above
the incumbent at that time and above the best value of the study.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from hpsearch import paths
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search.autotune import MachineChoice
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.study import run_study


def best_dropped(record: StudyRecord, n: int) -> list[TrialRecord]:
    """The `n` dropped trials with the highest estimates, best first."""
    dropped = [trial for trial in record.trials() if trial.outcome == "pruned"]
    return sorted(dropped, key=lambda trial: (-(trial.value or 0.0), trial.number))[:n]


def reopen(source: StudyRecord, chosen: list[TrialRecord], project: ProjectPaths) -> None:
    """A copy of the study in `project` that has the chosen trials left to finish, and no pruner."""
    study = project.study(source.name)
    shutil.copytree(source.paths.root, study.root, ignore=shutil.ignore_patterns("final", "report*", ".tracking"))
    copy = StudyRecord.open(study)
    n_counted = len([trial for trial in copy.trials() if trial.outcome != "infeasible"])
    settings = dataclasses.replace(copy.config.study, pruner="none", confirm=0, trials=n_counted)
    paths.write_text(study.toml, dataclasses.replace(copy.config, study=settings).to_toml())
    for trial in chosen:
        for fold in range(source.n_folds):
            fit = copy.fit(trial.number, fold)
            if not fit.is_finished:
                # Its checkpoint is gone: it is fitted from the start.
                shutil.rmtree(fit.paths.root, ignore_errors=True)
        copy.write_evaluation(
            dataclasses.replace(trial, outcome=None, value=None, reason="", ended_at=None, decisions=())
        )


def print_table(source: StudyRecord, completed: StudyRecord, chosen: list[TrialRecord]) -> None:
    best = source.best()
    assert best is not None
    assert best.value is not None
    print(
        f"{'trial':>5s}  {'dropped':>16s}  against  estimate  completed  over incumbent  over best ({best.value:.4f})"
    )
    for trial in chosen:
        value, decision = completed.trial(trial.number).value, trial.decisions[-1]
        if value is None:
            print(f"{trial.number:5d}  not finished yet")
            continue
        incumbent = source.trial(decision["against"]).value
        assert incumbent is not None
        when = f"fold {decision['fold']}, epoch {decision['epoch']}"
        print(
            f"{trial.number:5d}  {when:>16s}  {decision['against']:7d}  {trial.value:8.4f}  {value:9.4f}"
            f"  {value - incumbent:+14.4f}  {value - best.value:+9.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder of a study that raced")
    parser.add_argument("--out", type=Path, required=True, help="project folder of the copy")
    parser.add_argument("-n", type=int, default=5, help="how many dropped trials")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    source = StudyRecord.open(StudyPaths(options.study.resolve()))
    project = ProjectPaths(options.out)
    chosen = best_dropped(source, options.n)
    if not project.study(source.name).toml.is_file():
        reopen(source, chosen, project)
    config = StudyRecord.open(project.study(source.name)).config
    machine = MachineChoice("auto", options.workers, options.threads)
    summary = run_study(project, source.name, config, machine=machine)
    print_table(source, summary.record, chosen)


if __name__ == "__main__":
    main()
