"""`hpsearch predict`: predict the masks of images at their own resolution."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from hpsearch.cli.options import device_option, model_option, out_option, study_option, threads_option
from hpsearch.paths import ProjectPaths
from hpsearch.user_files import printable


@click.command("predict")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@model_option
@click.option(
    "--out-dir",
    default="masks",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the masks into this folder (default: masks).",
)
@click.option("--probabilities", is_flag=True, help="Also write the probabilities, as 8-bit PNG.")
@click.option("--overlays", is_flag=True, help="Also write each image with the outline of its mask.")
@click.option(
    "--tiles/--whole",
    default=None,
    help="Predict overlapping tiles at the image's own resolution, or the whole image resized (default: as trained).",
)
@click.option(
    "--ensemble/--single",
    default=None,
    help="Predict with the networks of all folds together, or with the retrained one (default: as `final` selected).",
)
@device_option
@threads_option
@out_option
@study_option
def command(
    project: ProjectPaths,
    study_name: str | None,
    files: tuple[str, ...],
    model: str | None,
    out_dir: Path,
    probabilities: bool,
    overlays: bool,
    **how: Any,
) -> int:
    """Predict the masks of image files, folders or globs.

    Each mask is written as `<name>_segmentation.png` with the values 0 and 255, at the size of its image. Files that
    cannot be read are listed and skipped; the exit code is then 1.

    \b
        hpsearch predict photos --out-dir masks --overlays
        hpsearch predict 'visits/**/*.jpg' --model studies/isic2017/final/trial-0017
    """
    from rich.progress import Progress

    from hpsearch.inference.predictor import Ensemble, find_images, find_model, load_predictor, predict_files
    from hpsearch.report.formats import count

    images = find_images(files)
    weights = find_model(project, study_name, model)
    predictor = load_predictor(weights, **how)
    parts = "overlapping tiles" if predictor.tiles else "the whole image"
    height, width = predictor.info.size
    networks = f"ensemble of {len(predictor.members)}" if isinstance(predictor, Ensemble) else "one network"
    click.echo(f"{count(len(images), 'image')}, {weights} ({networks}), {parts} at {height}x{width}")
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("predicting", total=len(images))

        def on_image(done: int, total: int, path: Path, reason: str | None) -> None:
            progress.update(task, completed=done, description=f"predicting {done}/{total}")
            if reason is not None:
                progress.console.print(f"skipped: {printable(reason)}", markup=False, highlight=False, soft_wrap=True)

        bad = predict_files(
            predictor, images, out_dir, probabilities=probabilities, overlays=overlays, on_image=on_image
        )
    click.echo(f"{count(len(images) - len(bad), 'mask')} in {out_dir}")
    if bad:
        click.echo(f"{len(bad)} of {len(images)} files could not be read:")
        for path in bad:
            click.echo(f"  {printable(path)}")
    return 1 if bad else 0
