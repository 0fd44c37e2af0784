"""`hpsearch final`: retrain a configuration and evaluate it on the test split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

import hpsearch
from hpsearch.cli import options
from hpsearch.cli.describe import describe_behind, describe_params, next_command, tracker_of_existing
from hpsearch.cli.options import AT_LEAST_0, AT_LEAST_1
from hpsearch.cli.terminal import counter, stop_on_signals
from hpsearch.paths import ProjectPaths
from hpsearch.report.formats import count, interval, setting
from hpsearch.search.stopping import Stop
from hpsearch.training.rows import EpochRow


@click.command("final")
@options.study_options
@click.option("--best", is_flag=True, help="Retrain the best complete trial (the default).")
@click.option("--trial", type=AT_LEAST_0, help="Retrain this trial.")
@click.option("--cheapest-tied", is_flag=True, help="Retrain the fastest trial that is tied with the best.")
@click.option("--seeds", "n_seeds", default=1, type=AT_LEAST_1, help="Train this many networks with different seeds.")
@click.option("--ensemble", is_flag=True, help="Also evaluate the ensemble of the fold networks on the test images.")
@options.machine_options
@click.option("--zip", "submission", is_flag=True, help="Also pack the test masks into a zip file for the challenge.")
@options.tracking_option
def final(project: ProjectPaths, study_name: str | None, best: bool, tracking: str | None, **chosen: Any) -> int:
    """Retrain a configuration and evaluate it on the test split.

    The network is trained on the pool, that is, on all training and validation images. The command shows the test
    scores next to the estimate from the search. It also shows the gain over the default configuration, which is
    computed from the out-of-fold scores of the pool images, not from the test images. The threshold, test-time
    augmentation and mask cleaning are selected on out-of-fold predictions, never on the test set.

    \b
        hpsearch final --best
        hpsearch final --trial 17 --seeds 3
    """
    if best + chosen["cheapest_tied"] + (chosen["trial"] is not None) > 1:
        raise click.UsageError("use only one of --best, --trial and --cheapest-tied")
    name = hpsearch.study_record(project, study_name).name

    def on_epoch(index: int, row: EpochRow) -> None:
        line = f"network {index + 1} of {chosen['n_seeds']}, epoch {row.epoch}: training loss {row.train.loss:.4f}"
        click.echo(f"{line}, training Dice {row.train.dice:.4f}, {row.images_per_s:.0f} images/s")

    stop = Stop()
    with stop_on_signals(stop):
        result = hpsearch.run_final(
            project,
            name,
            tracker=tracker_of_existing(project, tracking),
            on_epoch=on_epoch,
            on_decoded=counter("decoding images"),
            on_step=click.echo,
            stop=stop,
            **chosen,
        )
    click.echo("\n".join(describe(result)))
    click.echo(f"Next: {next_command('report', result.study, project)}")
    if result.undelivered:
        click.echo(describe_behind(result.study, project, tracking, result.tracking_error))
    return 0


def describe(result: hpsearch.FinalResult) -> list[str]:
    """Return the lines that the command prints: the scores, their interpretation and the paths of the files."""
    pool, test = count(result.n_pool, "pool image"), count(result.n_test, "test image")
    params, seeds = describe_params(result.trial.params), result.per_seed[result.metric]
    lines = ["", f"study {result.study}, trial {result.trial.number}: {params}".rstrip()]
    lines += [f"retrained on {pool}, evaluated on {test}", "", *_table(result)]
    lines += ["official: the kept model at each image's own resolution, scored as in the ISIC-2017 challenge"]
    if len(seeds) > 1:
        lines.append(f"test {result.metric} of each network: " + ", ".join(f"{value:.4f}" for value in seeds))
    lines += ["", *_sentences(result), "", f"model, masks, scores of every image, figures: {result.paths.root}"]
    if result.paths.submission.is_file():
        lines.append(f"submission: {result.paths.submission}")
    return lines


def _table(result: hpsearch.FinalResult) -> Iterator[str]:
    metric = result.metric
    yield f"{'':36}mean    95 % interval"
    blocks = {"cross-validation": {metric: result.cv}}
    if result.corrected is not None and result.corrected.method != "single":
        blocks["corrected"] = {metric: result.corrected.interval}
    if result.predicted is not None:
        blocks["predicted for test"] = {metric: result.predicted}
    blocks[f"test at {setting(result.eval_size)}"] = result.test
    if result.chosen_test:
        blocks["test, post-processed"] = {metric: result.chosen_test[metric]}
    blocks["test, official"] = result.official
    if result.ensemble is not None:
        blocks[f"ensemble of {result.ensemble.n_networks}"] = {metric: result.ensemble.test[metric]}
        blocks["ensemble, official"] = result.ensemble.official
    fits = ", mean of two fits per fold" if result.is_confirmed else ""
    more = f"   sd of the folds {result.cv_fold_std:.4f}{fits}"
    for title, scores in blocks.items():
        for row, (name, score) in enumerate(scores.items()):
            text = f"{'' if row else title:21}{name:>17}  {score.mean:.4f}  [{score.low:.4f}, {score.high:.4f}]"
            yield text + more if title == "cross-validation" else text
    if result.without_leaks is not None:
        yield f"{'test, no duplicates':21}{metric:>17}  {result.without_leaks:.4f}"


def _sentences(result: hpsearch.FinalResult) -> Iterator[str]:
    from hpsearch.report.text import paragraphs

    comparison, *others = paragraphs("final", final=result)
    yield comparison
    gain = result.winner_against_default if result.is_default else result.against_default
    if result.is_default and result.trial.number == result.winner:
        yield "This is the default configuration: the search found nothing better."
    elif gain is not None:
        of_winner = f"This is the default configuration. The gain of trial {result.winner}, the best, over it"
        what = of_winner if result.is_default else "The gain over the default (trial 0)"
        yield f"{what} is {interval(gain, signed=True)} out of fold, corrected for selection."
    yield from others
