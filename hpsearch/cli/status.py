"""`hpsearch status`: what the studies here have reached."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click

from hpsearch.cli.options import out_option, study_option
from hpsearch.paths import ProjectPaths


@click.command("status")
@out_option
@study_option
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Every decision on this trial.")
def command(project: ProjectPaths, study_name: str | None, trial: int | None) -> None:
    """Trials, outcomes, best so far, what runs now and when it will be done. Reads the record only.

    Where there are several studies, those that run are shown, or all if none runs. With --study also every trial and
    why it ended; with --trial every decision of the pruner on one trial.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hpsearch.cli.progress import describe_params
    from hpsearch.paths import command_line, read_json
    from hpsearch.report.formats import duration, outcome_name
    from hpsearch.search.status import study_status
    from hpsearch.store import lock
    from hpsearch.store.record import no_study

    if trial is not None:
        _show_decisions(project, study_name, trial)
        return
    every = project.study_names()
    names = [study_name] if study_name else lock.running_studies(project) or every
    if not names:
        raise no_study(project)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for name in names:
        status = study_status(project, name)
        config = status.config
        outcomes = Counter(outcome_name(trial.outcome) for trial in status.trials if trial.outcome)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())) or "none ended"
        held = f"run by {lock.describe_holder(project.study(name))}" if status.is_running else "not running"
        console.print(Text(f"study {name}: {status.n_counted}/{config.study.trials} trials ({counts}); {held}"))
        if (best := status.best) is not None:
            console.print(
                Text(
                    f"  best: trial {best.number}, {config.study.metric} {status.values[best.number]:.4f}"
                    f"{' (both fits)' if status.is_confirmed else ''}  {describe_params(best.params)}"
                )
            )
        if status.shortlist:
            listed = ", ".join(map(str, status.shortlist))
            n_fits = len(status.shortlist) * status.n_folds
            those = f"trial{'s' if len(status.shortlist) > 1 else ''} {listed}"
            console.print(Text(f"  refitted with new seeds: {those}; {status.n_second}/{n_fits} fits done"))
        for warning in status.warnings:
            console.print(Text(f"  warning: {warning}"))
        if status.eta_s is not None:
            console.print(Text(f"  about {duration(status.eta_s)} to go"))
        for fit in status.open_fits:
            fold = f"{'replicate, ' if fit.is_second else ''}fold {fit.fold + 1} of {status.n_folds}"
            console.print(
                Text(
                    f"  trial {fit.trial}, {fold}, epoch {fit.epoch} of {fit.epochs}:"
                    f"  {config.study.metric} {fit.score:.4f}"
                )
            )
        if not status.is_running and not status.is_over:
            console.print(Text(f"  go on with it: {command_line('study', name, project)}"))
        finals = project.study(name).final_names()
        if not status.is_running and status.is_over and status.best is not None and not finals:
            console.print(Text(f"  next: {command_line('final --best', name, project)}"))
        for final in finals:
            folder = project.study(name).final(final)
            result = read_json(folder.result)
            score = result["test"][result["metric"]]["mean"]
            console.print(
                Text(f"  final of trial {result['trial']}: test {result['metric']} {score:.4f}, in {folder.root}")
            )
        if study_name is None:
            continue
        table = Table("trial", "outcome", "value", "folds", "time", "parameters", "why", box=None, pad_edge=False)
        for each in status.trials:
            value = status.values.get(each.number, each.value)
            table.add_row(
                str(each.number),
                outcome_name(each.outcome or "open"),
                f"{value:.4f}" if value is not None else "",
                f"{status.n_finished[each.number]}/{status.n_folds}",
                duration(status.seconds[each.number]),
                Text(describe_params(each.params)),
                Text(each.reason),
            )
        console.print(table)
    if not study_name and (others := [name for name in every if name not in names]):
        console.print(Text(f"not running: {', '.join(others)} (--study NAME shows one)"))


def _show_decisions(project: ProjectPaths, study_name: str | None, number: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hpsearch.cli.progress import describe_params
    from hpsearch.report.formats import outcome_name
    from hpsearch.search.racing import MATTERS
    from hpsearch.store.record import study_record

    record = study_record(project, study_name)
    trial = record.known_trial(number)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    worth = record.worth(trial)
    value = "" if worth is None else f", {record.config.study.metric} {worth:.4f}"
    ended = f"{outcome_name(trial.outcome or 'open')}{value}"
    console.print(Text(f"trial {number} of study {record.name}: {ended}  {describe_params(trial.params)}"))
    if trial.reason:
        console.print(Text(f"  {trial.reason}"))
    if not trial.decisions:
        if trial.outcome != "infeasible":
            console.print(Text("  nothing was decided: the pruner had nothing to compare it with, or is off"))
        return
    table = Table("fold", "epoch", "d", "SE", "s", "p", "against", "estimate", "decision", box=None, pad_edge=False)
    for decision in trial.decisions:
        figures = [decision.get(name) for name in ("d", "se", "s", "p")]
        table.add_row(
            str(decision["fold"] + 1),
            str(decision["epoch"]),
            *("" if figure is None else f"{figure:.2g}" for figure in figures),
            "" if decision.get("against") is None else str(decision["against"]),
            f"{decision['estimate']:.4f}",
            Text(_decided(decision)),
        )
    console.print(table)
    for line in (
        "d: how far the trial is below the best complete trial (`against`) on the same images; negative if above.",
        "Inside the first fold, d is that of the best-case curve of the trial.",
        "SE: standard error of d. s: run-to-run standard deviation of a fold's mean.",
        f"p: probability of such a large d if the trial is better by {MATTERS:g}. Only the race uses it.",
    ):
        console.print(Text(f"  {line}"))


def _decided(decision: dict[str, Any]) -> str:
    """Return the decision, with its reason unless the columns of the race give it."""
    outcome = "pruned" if decision["drop"] else "continues"
    # The reason of the race repeats the columns.
    return outcome if "±" in decision["reason"] else f"{outcome}: {decision['reason'].rpartition(': ')[2]}"
