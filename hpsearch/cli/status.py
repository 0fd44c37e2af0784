"""`hpsearch status`: show the progress of the studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from hpsearch.cli.console import echo_table
from hpsearch.cli.options import out_option, study_option
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.search.status import StudyStatus
    from hpsearch.store.record import StudyRecord
    from hpsearch.store.trials import PruneDecision


@click.command("status")
@out_option
@study_option
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Show every pruning decision for this trial.")
def command(project: ProjectPaths, study_name: str | None, trial: int | None) -> None:
    """Show trials, the best so far, running fits and remaining time.

    If there are several studies, the running ones are shown, or all if none is running. With --study, every trial is
    listed with the reason why it ended. With --trial, every decision of the pruner on one trial is shown.
    """
    from hpsearch.search.status import study_status
    from hpsearch.store import lock
    from hpsearch.store.record import no_study, study_record

    if trial is not None:
        _show_decisions(study_record(project, study_name), trial)
        return
    every = project.study_names()
    names = [study_name] if study_name else lock.running_studies(project) or every
    if not names:
        raise no_study(project)
    for name in names:
        status = study_status(project, name)
        click.echo(_head(project, status))
        for line in _lines(project, status):
            click.echo(f"  {line}")
        if study_name:
            echo_table(("trial", "outcome", "value", "folds", "time", "parameters", "reason"), _trial_rows(status))
    if not study_name and (others := [name for name in every if name not in names]):
        click.echo(f"not running: {', '.join(others)} (--study NAME shows one)")


def _head(project: ProjectPaths, status: StudyStatus) -> str:
    from hpsearch.store import lock

    outcomes = Counter(trial.outcome for trial in status.trials if trial.outcome)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())) or "none ended"
    holder = f"run by {lock.describe_holder(project.study(status.name))}" if status.is_running else "not running"
    return f"study {status.name}: {status.n_counted}/{status.config.study.trials} trials ({counts}); {holder}"


def _lines(project: ProjectPaths, status: StudyStatus) -> Iterator[str]:
    """Yield what follows the head line of a study."""
    from hpsearch.cli.describe import describe_params, next_command
    from hpsearch.report.formats import duration

    metric = status.config.study.metric
    if (best := status.best) is not None:
        value = f"{status.values[best.number]:.4f}{' (both fits)' if status.is_confirmed else ''}"
        yield f"best: trial {best.number}, {metric} {value}  {describe_params(best.params)}"
    if status.shortlist:
        listed = ("trial " if len(status.shortlist) == 1 else "trials ") + ", ".join(map(str, status.shortlist))
        n_fits = len(status.shortlist) * status.n_folds
        yield f"refitted with new seeds: {listed}; {status.n_replicate_fits}/{n_fits} fits done"
    yield from (f"warning: {warning}" for warning in status.warnings)
    if status.eta_s is not None:
        yield f"about {duration(status.eta_s)} left"
    for fit in status.open_fits:
        refit = "refit, " if fit.is_replicate else ""
        yield (
            f"trial {fit.trial}, {refit}fold {fit.fold + 1} of {status.n_folds}, epoch {fit.epoch} of {fit.epochs}:  "
            f"{metric} {fit.score:.4f}"
        )
    finals = project.study(status.name).final_names()
    if not status.is_running and not status.is_over:
        yield f"continue with: {next_command('study', status.name, project)}"
    elif not status.is_running and best is not None and not finals:
        yield f"next: {next_command('final --best', status.name, project)}"
    yield from (_final_line(project, status.name, final) for final in finals)


def _final_line(project: ProjectPaths, study: str, name: str) -> str:
    from hpsearch.paths import read_json

    folder = project.study(study).final(name)
    result = read_json(folder.result)
    metric = result["metric"]
    return f"final of trial {result['trial']}: test {metric} {result['test'][metric]['mean']:.4f}, in {folder.root}"


def _trial_rows(status: StudyStatus) -> Iterator[Sequence[str]]:
    from hpsearch.cli.describe import describe_params
    from hpsearch.report.formats import duration

    for trial in status.trials:
        value = status.values.get(trial.number, trial.value)
        yield (
            str(trial.number),
            trial.outcome or "open",
            "" if value is None else f"{value:.4f}",
            f"{status.n_finished[trial.number]}/{status.n_folds}",
            duration(status.seconds[trial.number]),
            describe_params(trial.params),
            trial.reason,
        )


def _show_decisions(record: StudyRecord, number: int) -> None:
    from hpsearch.cli.describe import describe_params
    from hpsearch.search.racing import MATTERS

    trial = record.known_trial(number)
    score = record.worth(trial)
    value = "" if score is None else f", {record.config.study.metric} {score:.4f}"
    outcome = trial.outcome or "open"
    click.echo(f"trial {number} of study {record.name}: {outcome}{value}  {describe_params(trial.params)}")
    if trial.reason:
        click.echo(f"  {trial.reason}")
    if not trial.decisions:
        if trial.outcome != "infeasible":
            click.echo("  no pruning decisions: the pruner is off, or had no trial to compare with")
        return
    head = ("fold", "epoch", "d", "SE", "s", "p", "against", "estimate", "decision")
    echo_table(head, map(_decision_row, trial.decisions))
    click.echo("  d: how far the trial is below the best complete trial (`against`) on the same images.")
    click.echo("  In the first fold, d is computed from the best-case curve of the trial. Negative d: it is better.")
    click.echo("  SE: standard error of d. s: run-to-run standard deviation of a fold's mean.")
    click.echo(f"  p: probability of such a large d if the trial is better by {MATTERS:g}. Only the race uses it.")


def _decision_row(decision: PruneDecision) -> Sequence[str]:
    outcome, reason = "pruned" if decision.drop else "continues", decision.reason
    # The columns already show the reasons of the race.
    text = outcome if "±" in reason else f"{outcome}: {reason.rpartition(': ')[2]}"
    numbers = (decision.d, decision.se, decision.s, decision.p)
    return (
        str(decision.fold + 1),
        str(decision.epoch),
        *("" if number is None else f"{number:.2g}" for number in numbers),
        "" if decision.against is None else str(decision.against),
        f"{decision.estimate:.4f}",
        text,
    )
