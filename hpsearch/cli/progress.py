"""What a person sees of a running study: live on a terminal, a line per event elsewhere."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsearch.cli.streams import write_to_stderr
from hpsearch.data.prepare import Prepared
from hpsearch.errors import redact
from hpsearch.paths import ProjectPaths, command_line
from hpsearch.report.formats import count, duration, outcome_name
from hpsearch.search.status import study_status
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import COUNTED, TrialRecord
from hpsearch.study import StudySummary
from hpsearch.training.rows import EpochRow
from hpsearch.workers.plan import ExecutionPlan, Forecast, describe_data

LONG_S = 36 * 3600.0
"""A search that is foreseen to take longer is worth a word before it begins."""


class DecodingLines:
    """Prints how many images are decoded, a few times in all; called as `progress(done, total)` of the caches."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self._next = 0.0
        if done >= self._next * total:
            self._show(f"decoding images: {done} of {total}")
            self._next = (done * 4 // total + 1) / 4


class StudyProgress:
    """Shows a running study. Use as a context manager, and as the study's callback."""

    def __init__(self, name: str, project: ProjectPaths, tracking: str | None = None) -> None:
        """`tracking` is the option `--tracking`."""
        self._name = name
        self._tracking = tracking
        self._project = project
        self._console = Console(highlight=False, soft_wrap=True)
        self._is_live = self._console.is_terminal
        self._record: StudyRecord | None = None
        self._images: tuple[int, int] | None = None
        self._trials: dict[int, TrialRecord] = {}
        self._best: tuple[int, float] | None = None
        """Number of the best trial so far and what it is ranked by."""
        self._fits: dict[tuple[int, int], EpochRow] = {}
        self._to_go: tuple[float, float] | None = None
        """Seconds to go, and when that was reckoned."""
        self._second: tuple[int, int] | None = None
        """Second fits done, and of how many."""
        self._interruption = ""
        self._say_decoded = DecodingLines(self._print)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def __enter__(self) -> StudyProgress:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def preparing(self, done: int, total: int) -> None:
        self._images = (done, total)
        if not self._is_live:
            self._say_decoded(done, total)

    def prepared(self, prepared: Prepared) -> None:
        self._images = None
        for note in prepared.notes:
            self._print(f"note: {note}")
        if prepared.excluded:
            n = len(prepared.excluded)
            more = ", ..." if n > 5 else ""
            named = ", ".join(prepared.excluded[:5]) + more
            self._print(f"left out {n} image{'s' if n > 1 else ''} with errors: {named}")

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        self._record = record
        self._trials = {trial.number: trial for trial in record.trials()}
        self._rank()
        self._to_go = (forecast.total_s, time.monotonic()) if math.isfinite(forecast.total_s) else None
        config = record.config
        if self._trials:
            counted = sum(trial.outcome in COUNTED for trial in self._trials.values())
            n_open = sum(trial.outcome is None for trial in self._trials.values())
            goes_on = (
                f", {n_open} {'goes on where it' if n_open == 1 else 'go on where they'} stopped" if n_open else ""
            )
            self._print(f"study {self._name} is continued: {counted} of {config.study.trials} trials done{goes_on}")
        on = plan.machine.get("device_name", plan.device)
        folds = "the fixed split" if config.study.folds == "fixed" else f"{config.study.folds} folds"
        self._print(
            f"study {self._name}: {count(config.study.trials, 'trial')} x {folds} x "
            f"{count(config.train.epochs, 'epoch')} on {forecast.n_images} images ({describe_data(config.data)})"
        )
        self._print(
            f"on {on}, {plan.precision}, {len(plan.workers)} worker(s) x {plan.workers[0].threads} thread(s); "
            f"sampler {config.study.sampler}, pruner {config.study.pruner}"
        )
        if forecast.n_trials and math.isfinite(forecast.total_s):
            self._print(describe_forecast(config.study.pruner, forecast))
        if forecast.total_s > LONG_S and plan.device == "cpu":
            self._print(
                "that is long: stop with Ctrl-C and take `--config isic2017-64`, the same search at 64x64 (hours), "
                "or a smaller --set data.size"
            )

    def trial_began(self, trial: TrialRecord) -> None:
        self._trials[trial.number] = trial
        if not self._is_live:
            self._print(f"trial {trial.number}: {describe_params(trial.params) or 'the configuration as given'}")

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        self._fits[trial, fold] = row

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        self._fits.pop((trial, fold), None)
        if not self._is_live:
            self._print(f"trial {trial}, fold {fold + 1}: {score:.4f}")

    def trial_ended(self, trial: TrialRecord) -> None:
        self._trials[trial.number] = trial
        for key in [key for key in self._fits if key[0] == trial.number]:
            del self._fits[key]
        self._rank()
        self._reckon()
        value = f"{trial.value:.4f}" if trial.value is not None else "-"
        mark = "  best so far" if self._best is not None and self._best[0] == trial.number else ""
        reason = f"  ({trial.reason})" if trial.outcome != "complete" and trial.reason else ""
        outcome = outcome_name(trial.outcome or "open")
        self._print(f"trial {trial.number} {outcome} {value}{mark}{reason}  {describe_params(trial.params)}")

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        if self._second is None:
            listed = ("trial " if len(trials) == 1 else "trials ") + ", ".join(map(str, trials))
            self._print(f"search finished; refitting the top candidates ({listed}) with new seeds")
        self._second = done, total
        self._rank()
        self._reckon()

    def message(self, text: str) -> None:
        self._rank()
        self._print(text)

    def interrupted(self, text: str) -> None:
        """Show what follows from a signal. Called in its handler, which may have interrupted a print: so no print."""
        if self._is_live:
            # The next refresh shows it; a line written between two would be overwritten.
            self._interruption = text
        else:
            write_to_stderr(text)

    def summarise(self, summary: StudySummary) -> None:
        """The result and the next step."""
        record = summary.record
        standing, n_trials = record.standing(), record.config.study.trials
        if (winner := standing.winner) is not None:
            both = ", both fits" if winner in standing.confirmed else ""
            self._print(
                f"best: trial {winner}, {record.config.study.metric} {standing.values[winner]:.4f} out of fold{both} "
                f" {describe_params(record.trial(winner).params)}"
            )
        if summary.stopped:
            self._print(
                f"stopped with {summary.n_counted} of {n_trials} trials: run the same command again to continue"
            )
        else:
            self._print(f"{summary.n_counted} of {n_trials} trials done. Next:")
            self._print(f"  {command_line('final --best', self._name, self._project)}")
            root = self._project.root
            folder = "" if str(root) == "." else f"cd {shlex.quote(str(root))} && "
            if self._tracking != "none":
                self._print(f"  {folder}mlflow ui")
            self._print(f"  {command_line('report', self._name, self._project)}")
        if summary.undelivered:
            self._print(undelivered(self._name, self._project, self._tracking, summary.tracking_error))

    def _rank(self) -> None:
        if self._record is not None:
            standing = self._record.standing()
            self._best = None if standing.winner is None else (standing.winner, standing.values[standing.winner])

    def _print(self, text: str) -> None:
        # The study does not end with its terminal, or with whoever read its output: all is in its log too.
        with contextlib.suppress(OSError):
            # Text, not markup: names and reasons may hold brackets.
            self._console.print(Text(text))
            sys.stdout.flush()

    def _render(self) -> Group:
        if self._images is not None:
            done, total = self._images
            return Group(_bar(f"decoding images {done}/{total}", done, total), *self._last_lines())
        if self._record is None:
            return Group(Text("getting ready"), *self._last_lines())
        config = self._record.config
        counted = sum(trial.outcome in COUNTED for trial in self._trials.values())
        head = f"study {self._name}  {counted}/{config.study.trials} trials"
        if self._best is not None:
            head += f"  best {self._best[1]:.4f} (trial {self._best[0]})"
        done, total = counted, config.study.trials
        if self._second is not None:
            done, total = self._second
            head += f"  refits {done}/{total}"
        lines = [_bar(f"{head}  ETA {self._eta()}", done, total)]
        table = Table.grid(padding=(0, 2))
        for (trial, fold), row in sorted(self._fits.items()):
            scores = row.scores
            table.add_row(
                f"  trial {trial}",
                f"fold {fold + 1} of {self._record.n_folds}",
                f"epoch {row.epoch} of {self._trials[trial].config['train']['epochs']}",
                f"loss {row.train.loss:.3f}",
                f"{config.study.metric} {getattr(scores, config.study.metric):.4f}",
                f"{row.images_per_s:.0f} images/s",
            )
        return Group(*lines, table, *self._last_lines())

    def _last_lines(self) -> list[Text]:
        return [Text(self._interruption, style="bold")] if self._interruption else []

    def _reckon(self) -> None:
        """How long it will still take, by what has been recorded so far."""
        if self._is_live and (seconds := study_status(self._project, self._name).eta_s) is not None:
            self._to_go = seconds, time.monotonic()

    def _eta(self) -> str:
        if self._to_go is None:
            return "?"
        seconds, reckoned_at = self._to_go
        return duration(max(0.0, seconds - (time.monotonic() - reckoned_at)))


def undelivered(study: str, project: ProjectPaths, tracking: str | None, error: str) -> str:
    """Say that MLflow lacks something of a study, why, and which command delivers it; `tracking` is `--tracking`."""
    retry = command_line("track", study, project)
    if tracking is not None:
        retry += f" --tracking {shlex.quote(redact(tracking))}"
    because = f" ({error})" if error else ""
    return f"MLflow is not up to date{because}. Everything is on record; deliver it with: {retry}"


def describe_forecast(pruner: str, forecast: Forecast) -> str:
    """Return how long a search will take, in a sentence."""
    then = f", then up to {count(forecast.n_replicates, 'refit')}" if forecast.n_replicates else ""
    most, saved = ("at most about", "; racing saves most of it") if pruner == "race" else ("about", "")
    fit = duration(forecast.fit_s) if forecast.fit_s >= 10 else f"{forecast.fit_s:.1f} s"
    return (
        f"{count(forecast.n_trials, 'trial')} left{then}: {most} {duration(forecast.total_s)} of training here, "
        f"{fit} a fit, as measured{saved}"
    )


def describe_params(params: Mapping[str, Any]) -> str:
    """`base_channels=8 depth=3 lr=0.0123`: the settings by their last name."""
    return " ".join(
        f"{name.partition('.')[2]}={value:.3g}" if isinstance(value, float) else f"{name.partition('.')[2]}={value}"
        for name, value in params.items()
    )


def _bar(text: str, done: int, total: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=max(1, total), completed=done, width=30), Text(text))
    return grid
