"""`hpsearch status` and `hpsearch stop`: show the progress of the studies, and stop one from outside."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

import hpsearch
from hpsearch.cli.describe import describe_best, describe_params, listed_trials, next_command
from hpsearch.cli.options import AT_LEAST_0, study_options, study_options_with
from hpsearch.cli.terminal import echo_table
from hpsearch.errors import StudyError
from hpsearch.paths import FitPaths, ProjectPaths, write_text
from hpsearch.report.formats import count, duration
from hpsearch.store import lock
from hpsearch.store.trials import PruneDecision, read_record

if TYPE_CHECKING:
    from hpsearch.search.status import OpenFit, StudyStatus
    from hpsearch.store.record import StudyRecord

WAIT_S = 600.0
"""Longest time in seconds that `hpsearch stop` waits for the study to stop."""


@click.command("status")
@study_options_with("the running studies, or all if none is running")
@click.option("--trial", type=AT_LEAST_0, metavar="N", help="Show every pruning decision for this trial.")
def status(project: ProjectPaths, study_name: str | None, trial: int | None) -> None:
    """Show the trials, the best result, running fits and the time left.

    If there are several studies, the running ones are shown, or all studies if none is running. With --study, every
    trial is listed with the reason why it ended. With --trial, every pruning decision for this trial is shown.
    """
    from hpsearch.store.record import no_study

    if trial is not None:
        _show_decisions(hpsearch.study_record(project, study_name), trial)
        return
    every, held = project.study_names(), lock.held_studies(project)
    names = [study_name] if study_name else [name for name in every if name in held] or every
    starting = [name for name in held if name not in every]
    for name in starting:
        click.echo(f"study {name} is starting; run by {lock.describe_holder(project.study(name))}")
    if not names and not starting:
        raise no_study(project)
    for name in names:
        found = hpsearch.study_status(project, name)
        click.echo("\n  ".join(_lines(project, found)))
        if found.is_running:
            echo_table(("worker", "runs", found.config.study.metric, "speed"), _worker_rows(found))
        else:
            # Show only fits with a checkpoint.
            stopped = (_fit_cells(found, fit) for fit in found.open_fits if fit.row)
            echo_table(("stopped in", found.config.study.metric), stopped)
        if study_name:
            echo_table(("trial", "outcome", "value", "folds", "time", "parameters", "reason"), _trial_rows(found))
    if not study_name and (others := [name for name in every if name not in names]):
        click.echo(f"not running: {', '.join(others)} (--study NAME shows one)")


def _lines(project: ProjectPaths, status: StudyStatus) -> Iterator[str]:
    """Yield the lines that describe the status of a study. The first line is the heading."""
    from hpsearch.report.final_record import FinalRecord
    from hpsearch.search.racing import MATTERS
    from hpsearch.store.fits import FitRecord

    study = project.study(status.name)
    outcomes = Counter(trial.outcome or "open" for trial in status.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())) or "none ended"
    holder = f"run by {lock.describe_holder(study)}" if status.is_running else "not running"
    yield f"study {status.name}: {status.n_counted}/{status.config.study.trials} trials ({counts}); {holder}"
    if best := describe_best(status):
        yield best
    if status.gain_probability < 1:
        gain = status.config.study.until_gain or MATTERS
        trials = count(status.n_new, "further trial")
        yield f"probability that {trials} will improve the score by {gain:g}: {status.gain_probability:.0%}"
    if status.shortlist:
        done = f"{status.n_replicate_fits}/{len(status.shortlist) * status.n_folds} fits done"
        yield f"refitted with new seeds: {listed_trials(status.shortlist)}; {done}"
    yield from (f"warning: {warning}" for warning in status.warnings)
    if status.eta_s is not None:
        yield f"about {duration(status.eta_s)} left"
    finals = study.final_names()
    if status.is_running:
        for path in sorted(study.finals.glob("*/seed*")) if status.is_over else ():
            fit = FitRecord(FitPaths(path))
            if not fit.is_finished and (rows := fit.epochs()):
                network = int(path.name.removeprefix("seed")) + 1
                yield f"final of {path.parent.name}, network {network}: epoch {rows[-1].epoch}"
    elif not status.is_over:
        yield f"continue with: {next_command('study', status.name, project, status.scheduler)}"
    elif best and not finals:
        yield f"next: {next_command('final --best', status.name, project, status.scheduler)}"
    for name in finals:
        folder = study.final(name)
        result = read_record(FinalRecord, folder.result)
        score = f"{result.metric} {result.test[result.metric].mean:.4f}"
        yield f"final of trial {result.trial}: test {score}, in {folder.root}"


def _worker_rows(status: StudyStatus) -> Iterator[Sequence[str]]:
    """Yield a row for each open fit and for each idle Dask worker."""
    names = {
        worker.name: f"{worker.name} ({worker.device_name}, {worker.capacity.memory_bytes / 2**30:.1f} GiB)"
        for worker in status.cluster
    }
    for fit in status.open_fits:
        speed = f"{fit.row.seconds:.1f} s per epoch, {fit.row.images_per_s:.0f} images/s" if fit.row else ""
        name = names.get(fit.worker, fit.worker)
        yield name or "(waiting)", *_fit_cells(status, fit), speed if name else ""
    busy = {fit.worker for fit in status.open_fits}
    yield from ((text, "idle", "", "") for name, text in names.items() if name not in busy)


def _fit_cells(status: StudyStatus, fit: OpenFit) -> tuple[str, str]:
    """Return the place of an open fit in the study, and its latest score."""
    fold = f"{'refit, ' if fit.is_replicate else ''}fold {fit.fold + 1} of {status.n_folds}"
    epoch = f"epoch {fit.row.epoch if fit.row else 0} of {fit.epochs}"
    score = f"{getattr(fit.row.scores, status.config.study.metric):.4f}" if fit.row else ""
    return f"trial {fit.trial}, {fold}, {epoch}", score


def _trial_rows(status: StudyStatus) -> Iterator[Sequence[str]]:
    for trial in status.trials:
        value, number = status.values.get(trial.number, trial.value), trial.number
        folds, seconds = f"{status.n_finished[number]}/{status.n_folds}", duration(status.seconds[number])
        score = "" if value is None else f"{value:.4f}"
        yield str(number), trial.outcome or "open", score, folds, seconds, describe_params(trial.params), trial.reason


def _show_decisions(record: StudyRecord, number: int) -> None:
    from hpsearch.search.racing import ALPHA, MATTERS, MAX_INSIDE

    trial = record.known_trial(number)
    score = record.standing().values.get(number, trial.value)
    value = "" if score is None else f", {record.config.study.metric} {score:.4f}"
    outcome = f"{trial.outcome or 'open'}{value}  {describe_params(trial.params)}".rstrip()
    click.echo("\n  ".join([f"trial {number} of study {record.name}: {outcome}", *filter(None, [trial.reason])]))
    for decision in trial.decisions:
        click.echo(f"  {_explain(decision, trial.study_config.train.epochs)}")
    if any("±" in decision.reason for decision in trial.decisions):
        rule = f"To win, a trial must exceed the expected score of the leading trial by {MATTERS:g}."
        limits = f"A trial is pruned below {ALPHA:.0%}, and in a best case below {ALPHA:.0%} (n + 1)"
        click.echo(f"  {rule}{' Trial 0 is never pruned.' if number == 0 else ''}")
        click.echo(f"  {limits}, at most {MAX_INSIDE:.0%}, if n other trials have finished a fold.")
    if not trial.decisions and trial.outcome != "infeasible":
        click.echo("  no pruning decisions: the pruner is off, or had no trial to compare with")


def _explain(decision: PruneDecision, n_epochs: int) -> str:
    """Return a sentence about a decision of a pruner."""
    place, outcome = f"fold {decision.fold + 1}, epoch {decision.epoch}", "pruned" if decision.drop else "continues"
    if decision.d is None or decision.p is None or "±" not in decision.reason:
        # Another pruner, or the user, decided.
        return f"{place}: {outcome}: {decision.reason.rpartition(': ')[2]}"
    side = f"{abs(decision.d):.4f} {'below' if decision.d >= 0 else 'above'} that of trial {decision.against}"
    best, wins = ("at best ", "In this best case, it") if decision.epoch < n_epochs else ("", "It")
    p, se = "less than 0.1%" if decision.p < 0.001 else f"{decision.p:.1%}", f"± {decision.se or 0:.4f}"
    return f"{place}: {outcome}. Its expected score is {best}{side} ({se}). {wins} wins with a probability of {p}."


@click.command("stop")
@study_options
@click.option("--trial", type=AT_LEAST_0, metavar="N", help="Stop only this trial; the study continues.")
@click.option("--now", is_flag=True, help="Stop at once, without finishing the current epochs.")
def stop(project: ProjectPaths, study_name: str | None, trial: int | None, now: bool) -> int:
    """Stop a running study from another terminal or machine.

    The study, or a running `final` of the study, stops after the current epochs. The command waits until it has
    stopped. Without --study, the only running study is stopped. If several studies are running, none is stopped and
    --study is required.

    \b
        hpsearch stop --study isic2017-64
        hpsearch stop --trial 7
    """
    record = hpsearch.study_record(project, study_name)
    study = record.paths
    if not lock.is_held(study):
        raise StudyError(f"study {study.name!r} is not running")
    holder = lock.describe_holder(study)
    if trial is not None:
        if (outcome := record.known_trial(trial).outcome) is not None:
            raise StudyError(f"trial {trial} of study {study.name!r} has ended already: {outcome}")
        write_text(study.trial_stop_request(trial), "stop")
        click.echo(f"asked {holder} to end trial {trial} after its epoch; the study goes on")
        return 0
    write_text(study.stop_request, "now" if now else "after this epoch")
    click.echo(f"asked {holder} to stop")
    began = time.monotonic()
    while lock.is_held(study):
        if time.monotonic() - began > WAIT_S:
            click.echo("it has not stopped yet, because its epochs are long; --now does not wait for them")
            return 1
        time.sleep(0.2)
    click.echo(f"study {study.name} has stopped; the command that started it continues it")
    return 0
