"""Show the progress of a study: a live display on a terminal, or one line per event otherwise."""

import contextlib
import dataclasses
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsearch.cli import describe
from hpsearch.cli.describe import describe_params
from hpsearch.cli.terminal import counter, write_to_stderr
from hpsearch.data.prepare import Prepared
from hpsearch.paths import ProjectPaths
from hpsearch.report.formats import count, duration
from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.status import StudyStatus, seconds_left, seconds_of, study_status
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord, count_trials
from hpsearch.study import StudySummary
from hpsearch.training.rows import EpochRow
from hpsearch.workers.plan import ExecutionPlan, Forecast, describe_data


class StudyProgress(StudyCallback):
    """Study callback of the command line. Close it after the study, so that the live display ends."""

    def __init__(self, name: str, project: ProjectPaths, tracking: str | None = None) -> None:
        """Prepare the display. `tracking` is the value of the option `--tracking`."""
        self._name, self._project, self._tracking = name, project, tracking
        self._console = Console(highlight=False, soft_wrap=True)
        self._status: StudyStatus | None = None
        """Latest status of the study, updated when a trial or refit ends; None before the search starts."""
        self._trials: dict[int, TrialRecord] = {}
        self._seconds: dict[int, float] = defaultdict(float)
        """Time spent on each trial in seconds, without refits."""
        self._refits_s = 0.0
        """Time spent on refits in seconds."""
        self._fits: dict[tuple[int, int], EpochRow] = {}
        self._ends_at: float | None = None
        """Expected end of the study on the monotonic clock, in seconds; None if unknown."""
        self._refits: tuple[int, int] | None = None
        """Number of finished refits and number of all refits; None before refitting starts."""
        self._interruption = ""
        self._decoding = counter("decoding images")
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def close(self) -> None:
        """End the live display."""
        self._live.stop()

    def preparing(self, done: int, total: int) -> None:
        self._decoding(done, total)

    def prepared(self, prepared: Prepared) -> None:
        for note in prepared.notes:
            self._print(f"note: {note}")
        if excluded := prepared.excluded:
            named = ", ".join([*excluded[:5], "..."] if len(excluded) > 5 else excluded)
            self._print(f"left out {count(len(excluded), 'image')} with errors: {named}")

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        config, study, status = record.config, record.config.study, study_status(self._project, self._name)
        self._record, self._plan, self._status = record, plan, status
        self._trials = {trial.number: trial for trial in status.trials}
        self._seconds.update(status.seconds)
        self._refits_s = sum(seconds_of(record.fits(number, replicate=1)) for number in status.shortlist)
        n_trials, epochs = count(study.trials, "trial"), count(config.train.epochs, "epoch")
        if status.trials:
            self._print(f"continuing study {self._name}: {status.n_counted} of {n_trials} done")
        size = f"{n_trials} x {describe.describe_folds(config)} x {epochs}"
        images = f"{count(forecast.n_images, 'image')} ({describe_data(config.data)})"
        self._print(f"study {self._name}: {size} on {images}")
        self._print(f"{describe.describe_machine(plan)}; sampler {study.sampler}, pruner {study.pruner}")
        if math.isfinite(forecast.expected_s):
            self._ends_at = time.monotonic() + forecast.expected_s
            if forecast.n_trials:
                self._print(describe.describe_forecast(forecast, "this cluster" if plan.cluster else "this machine"))
        if self._console.is_terminal:
            self._live.start()

    def replanned(self, plan: ExecutionPlan) -> None:
        self._plan = plan
        self._update()

    def trial_began(self, trial: TrialRecord) -> None:
        self._trials[trial.number] = trial
        if not self._live.is_started:
            self._print(f"trial {trial.number}: {describe_params(trial.params) or 'the configuration as given'}")

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        self._fits[trial, fold] = row
        if self._refits is None:
            self._seconds[trial] += row.seconds
        else:
            self._refits_s += row.seconds

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        self._fits.pop((trial, fold), None)
        if not self._live.is_started:
            refit = "" if self._refits is None else "refit of "
            self._print(f"{refit}trial {trial}, fold {fold + 1}: {score:.4f}")

    def trial_ended(self, trial: TrialRecord) -> None:
        self._fits = {key: row for key, row in self._fits.items() if key[0] != trial.number}
        self._trials[trial.number] = trial
        self._seconds[trial.number] = seconds_of(self._record.fits(trial.number))
        best = self._update()
        value = f" {trial.value:.4f}" if trial.value is not None else ""
        mark = "  best so far" if best is not None and best.number == trial.number else ""
        reason = f"  ({trial.reason})" if trial.outcome != "complete" and trial.reason else ""
        self._print(f"trial {trial.number} {trial.outcome}{value}{mark}{reason}  {describe_params(trial.params)}")

    def leader_changed(self, trial: int, value: float) -> None:
        if self._status is not None:
            self._status = dataclasses.replace(self._status, leader=self._trials[trial], leader_value=value)

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        if self._refits is None:
            top = "top candidate" if len(trials) == 1 else "top candidates"
            self._print(f"search finished; refitting the {top} ({describe.listed_trials(trials)}) with new seeds")
        self._refits = done, total
        self._update()

    def message(self, text: str) -> None:
        self._print(text)

    def interrupted(self, text: str) -> None:
        """Show a message from a signal handler, which must not print because it may have interrupted a print."""
        if self._live.is_started:
            # The next refresh shows the message. A line written between two refreshes would be overwritten.
            self._interruption = text
        else:
            write_to_stderr(text)

    def summarise(self, summary: StudySummary) -> None:
        """Print the result and the next commands."""
        n_trials = count(summary.record.config.study.trials, "trial")
        status = study_status(self._project, self._name)
        if best := describe.describe_best(status):
            self._print(best)
        if summary.stopped:
            n_open = sum(trial.outcome is None for trial in status.trials)
            done = f"{summary.n_counted} of {n_trials} done, {n_open} open"
            self._print(f"stopped: {done}. Run the same command again to continue")
        else:
            self._print(f"{summary.n_counted} of {n_trials} done. Next:")
            self._print(f"  {describe.next_command('final --best', self._name, self._project, status.scheduler)}")
            if self._tracking != "none":
                self._print(f"  {describe.mlflow_command(self._project)}")
            self._print(f"  {describe.next_command('report', self._name, self._project)}")
        if summary.undelivered:
            self._print(describe.describe_behind(self._name, self._project, self._tracking, summary.tracking_error))

    def _update(self) -> TrialRecord | None:
        """Update the status and the expected end, and return the best trial.

        Reading a study of thousands of trials takes seconds, in which its fits would wait, so only changes are read.
        """
        if self._status is None:
            return None
        trials = list(self._trials.values())
        standing = self._record.standing(trials)
        best = None if standing.winner is None else self._trials[standing.winner]
        n_counted = count_trials(trials)
        self._status = dataclasses.replace(self._status, n_counted=n_counted, best=best, values=standing.values)
        left_s = seconds_left(self._record, self._plan, trials, self._seconds, self._refits_s)
        if left_s is not None:
            self._ends_at = time.monotonic() + left_s
        return best

    def _print(self, text: str) -> None:
        # A study continues after its terminal was closed, so ignore write errors. The log has all messages.
        with contextlib.suppress(OSError):
            # Use Text to disable markup, because names and reasons may contain brackets.
            self._console.print(Text(text.rstrip()))
            sys.stdout.flush()

    def _render(self) -> Group:
        """Return the content of the live display."""
        last = [Text(self._interruption, style="bold")] if self._interruption else []
        if (status := self._status) is None:
            return Group(*last)
        metric, done, total = status.config.study.metric, status.n_counted, status.config.study.trials
        head = f"study {self._name}  {done}/{total} trials"
        if status.leader is not None and self._trials[status.leader.number].outcome is None:
            head += f"  leading {status.leader_value:.4f} (trial {status.leader.number})"
        elif status.best is not None:
            head += f"  best {status.values[status.best.number]:.4f} (trial {status.best.number})"
        if self._refits is not None:
            done, total = self._refits
            head += f"  refits {done}/{total}"
        eta = "?" if self._ends_at is None else duration(max(0.0, self._ends_at - time.monotonic()))
        # After the last fit, only Optuna's database and MLflow remain to be updated.
        rest = f"ETA {eta}" if self._fits or done < total else "finishing"
        fits = Table.grid(padding=(0, 2))
        for (trial, fold), row in sorted(self._fits.items()):
            fits.add_row(
                f"  trial {trial}",
                f"fold {fold + 1} of {status.n_folds}",
                f"epoch {row.epoch} of {self._trials[trial].config['train']['epochs']}",
                f"loss {row.train.loss:.3f}",
                f"{metric} {getattr(row.scores, metric):.4f}",
                f"{row.images_per_s:.0f} images/s",
            )
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=max(1, total), completed=done, width=30), Text(f"{head}  {rest}"))
        return Group(bar, fits, *last)
