"""Writes the card of a final model: what it is, what it was trained on, what it scores, and what it is not for."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from hpsearch import __version__
from hpsearch.config import StudyConfig
from hpsearch.models.costs import n_parameters
from hpsearch.report import words
from hpsearch.report.rows import FinalRow, StudyRows, study_rows
from hpsearch.store.record import StudyRecord

LIMITS = (
    "It is **not a medical device**: it was not tested for any clinical use, and must not inform a diagnosis or a "
    "treatment.",
    "It was trained and scored on images of one kind. Of images from other devices, clinics or people, other skin "
    "types, and of anything that is no such image, nothing is known.",
    "It outlines what it takes for a lesion in every image, and does not say what the lesion is, or that there is "
    "none.",
    "Means hide single images: some are missed altogether (see the scores of every image, `test.csv`).",
)


def model_card(record: StudyRecord, name: str) -> str:
    """The card, Markdown, of the final of that name (`trial-0007`); it must have its result on record.

    Raises RecordError if the study's folder is damaged.
    """
    rows = study_rows(record)
    final = next(final for final in rows.finals if final.name == name)
    return render(rows, final, record.trial(final.trial).study_config)


def render(rows: StudyRows, final: FinalRow, config: StudyConfig) -> str:
    """The card from what is known of the study, the final and its configuration."""
    unet, data = config.unet, config.data
    color = "RGB" if data.color == "rgb" else "grayscale, made from RGB"
    blocks = [
        f"# {_literal(rows.name)}, trial {final.trial}: masks of skin lesions",
        f"A UNet that outlines lesions in images. For research; **not a medical device**. Made by hpsearch "
        f"{__version__}.",
        "## Model",
        f"- UNet: {unet.base_channels} base channels, depth {unet.depth}, {unet.stacking} convolutions a stage of "
        f"kernel {unet.kernel_size}, `{unet.padding}` padding, normalisation `{unet.norm}`, "
        f"{n_parameters(unet, data.n_channels):,} parameters.\n"
        f"- Input: {color}, {data.height}x{data.width} pixels ({_matching(config)}), standardised. Output: a logit a "
        "pixel, brought back to the image's own size.\n"
        f"- Trained for {config.train.epochs} epochs, batch {config.train.batch_size}, learning rate "
        f"{config.train.lr:.4g}, loss `{config.train.loss}`, optimizer `{config.train.optimizer}`.",
        "## Data",
        f"- Trained on all {final.n_pool} images of the pool (training and validation) of "
        f"`{_literal(_dataset(config))}`, content key `{rows.repeat.data_key}`.\n"
        f"- Scored on {final.n_test} test images that neither search nor training had read.",
        "## Protocol",
        words.methods(rows),
        "## Scores",
        "\n".join(_table(rows, final)),
        "Means over images; in brackets 95 % intervals that hold the luck of the images. Original resolution: as the "
        "ISIC-2017 challenge scores.",
        "\n\n".join(words.final(final, rows.metric)),
        *([] if rows.winner is None or rows.winner.number != final.trial else [_estimate(rows)]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(config)),
        "## Use",
        "    hpsearch predict photos --model .      masks of files and folders\n"
        "    hpsearch export --onnx --model .       ONNX, with what comes before and after it in its metadata",
    ]
    return "\n\n".join(blocks) + "\n"


def _table(rows: StudyRows, final: FinalRow) -> Iterator[str]:
    head = ["score", f"cross-validation, {rows.n_images} images", f"test, {final.n_test} images"]
    columns = [final.cv, final.test]
    if final.official:
        head.append("test, original resolution")
        columns.append(final.official)
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for name in words.SCORES:
        cells = [words.interval(scores[name]) if name in scores else "" for scores in columns]
        if any(cells):
            yield f"| {words.SCORES[name]} | {' | '.join(cells)} |"


def _estimate(rows: StudyRows) -> str:
    assert rows.winner is not None
    estimate = words.interval(rows.winner.corrected.interval)
    return (
        f"The search promised {words.SCORES[rows.metric]} {estimate} on new images like these, corrected for having "
        f"been chosen among {len(rows.full)}."
    )


def _limits(config: StudyConfig) -> Iterator[str]:
    if config.data.root == "sample" and not config.data.images:
        yield "Its images are drawn, not photographed: its numbers say nothing about real ones."
    yield from LIMITS


def _matching(config: StudyConfig) -> str:
    return "the whole image resized" if config.data.match == "resize" else "windows of the image's own resolution"


def _dataset(config: StudyConfig) -> str:
    """The folder's own name: where it lies is nobody else's business."""
    return Path(config.data.images or config.data.root).name


def _literal(text: str) -> str:
    """Without anything that Markdown would take for its own."""
    return html.escape(text).replace("`", "'").replace("|", "/").replace("\n", " ")
