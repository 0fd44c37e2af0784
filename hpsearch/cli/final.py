"""`hpsearch final`: retrain and evaluate on the test split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hpsearch.cli.options import device_option, out_option, study_option, tracking_option
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.training.rows import EpochRow


@click.command("final")
@out_option
@study_option
@click.option("--best", is_flag=True, help="The best full trial (the default).")
@click.option("--trial", type=click.IntRange(min=0), help="This trial instead.")
@click.option(
    "--cheapest-tied",
    is_flag=True,
    help="Of the trials that cannot be told from the best, the one that took the least time.",
)
@click.option("--seeds", default=1, type=click.IntRange(min=1), help="Networks to train, with different seeds.")
@click.option("--ensemble", is_flag=True, help="Let the networks of the folds predict the test images too.")
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: as measured for the study).")
@click.option("--zip", "submission", is_flag=True, help="Pack the test masks into a zip, ready to submit.")
@tracking_option
def command(
    project: ProjectPaths,
    study_name: str | None,
    best: bool,
    trial: int | None,
    cheapest_tied: bool,
    seeds: int,
    ensemble: bool,
    device: str,
    threads: int | None,
    submission: bool,
    tracking: str | None,
) -> int:
    """Retrain a configuration on the whole pool and evaluate it on the test split.

    Shows what the search promised beside what the test set gave, and whether the search was worth it. Threshold,
    flips at test time and cleaning of the masks are chosen by out-of-fold predictions, never by the test set.

    \b
        hpsearch final --best
        hpsearch final --trial 17 --seeds 3
    """
    from rich.console import Console
    from rich.text import Text

    from hpsearch.cli.progress import DecodingLines, undelivered
    from hpsearch.cli.study import stop_on_signals
    from hpsearch.final import run_final
    from hpsearch.search.autotune import MachineChoice
    from hpsearch.search.stopping import Stop
    from hpsearch.tracking import make_tracker

    if best + cheapest_tied + (trial is not None) > 1:
        raise click.UsageError("--best, --trial and --cheapest-tied exclude each other")
    console = Console(highlight=False, soft_wrap=True)
    stop = Stop()

    def show(text: str) -> None:
        console.print(Text(text))

    def on_epoch(index: int, row: EpochRow) -> bool:
        line = f"network {index + 1}/{seeds}, epoch {row.epoch}: loss {row.train.loss:.4f}, Dice {row.train.dice:.4f}"
        console.print(Text(f"{line} in training, {row.images_per_s:.0f} images/s"))
        return True

    with stop_on_signals(stop):
        result = run_final(
            project,
            study_name,
            trial=trial,
            cheapest_tied=cheapest_tied,
            n_seeds=seeds,
            ensemble=ensemble,
            machine=MachineChoice(device, 0, threads or 0),
            tracker=make_tracker(project, tracking),
            on_epoch=on_epoch,
            on_decoded=DecodingLines(show),
            on_step=show,
            submission=submission,
            stop=stop,
        )
    # It is None only where `on_epoch` asks for it.
    assert result is not None
    for line in describe(result):
        console.print(Text(line))
    if result.undelivered:
        show(undelivered(result.study, project, tracking, result.tracking_error))
    return 0


def describe(result: Any) -> list[str]:
    """The final table, line by line."""
    from hpsearch.cli.progress import describe_params
    from hpsearch.report import claimed_words

    metric = result.metric
    lines = [
        "",
        f"study {result.study}, trial {result.trial.number}: {describe_params(result.trial.params)}",
        f"retrained on {result.n_pool} pool images, evaluated on {result.n_test} test images",
        "",
        f"{'':36}mean    95 % interval",
        f"{'cross-validation':21}{metric:>17}  {_interval(result.cv)}   sd of the folds {result.cv_fold_std:.4f}"
        + (", mean of two fits a fold" if result.is_confirmed else ""),
    ]
    if result.corrected is not None and result.corrected.method != "single":
        lines.append(f"{'corrected for choice':21}{metric:>17}  {_interval(result.corrected)}")
    if result.predicted is not None:
        lines.append(f"{'predicted for test':21}{metric:>17}  {_interval(result.predicted)}")
    height, width = result.eval_size
    tables = [(f"test at {height}x{width}", result.test), ("test, official", result.official)]
    if result.chosen_test:
        tables.insert(1, ("test, with choices", {metric: result.chosen_test[metric]}))
    if result.ensemble is not None:
        tables.append((f"ensemble of {result.ensemble.n_networks}", {metric: result.ensemble.test[metric]}))
        tables.append(("ensemble, official", result.ensemble.official))
    for title, scores in tables:
        for name, interval in scores.items():
            lines.append(f"{title if name == next(iter(scores)) else '':21}{name:>17}  {_interval(interval)}")
    if result.leaks:
        n_left = result.n_test - result.n_leaked
        value = f"{result.without_leaks:.4f}  over {n_left} images" if n_left else "none left"
        lines.append(f"{'test, no duplicates':21}{metric:>17}  {value}")
    lines.append("official: at each image's own resolution, as the ISIC-2017 challenge scores; of the model kept")
    seeds = result.per_seed[metric]
    if len(seeds) > 1:
        lines.append(f"each network's test {metric}: " + ", ".join(f"{value:.4f}" for value in seeds))
    lines += ["", *claimed_words.final_lines(result)]
    lines += ["", f"model, masks, scores of every image, figures: {result.paths.root}"]
    if result.paths.submission.is_file():
        lines.append(f"submission: {result.paths.submission}")
    return lines


def _interval(interval: Any) -> str:
    return f"{interval.mean:.4f}  [{interval.low:.4f}, {interval.high:.4f}]"
