"""`hpsearch predict`: masks of any images, at their own resolution."""

from __future__ import annotations

from pathlib import Path

import click

from hpsearch.cli.options import device_option, out_option, study_option
from hpsearch.paths import ProjectPaths
from hpsearch.user_files import printable


@click.command("predict")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option(
    "--model",
    metavar="FOLDER|FILE",
    help="A folder of `final`, or a weights file (default: the study's latest final).",
)
@click.option(
    "--out-dir",
    default="masks",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the masks go (default: masks).",
)
@click.option("--probabilities", is_flag=True, help="Write probabilities too, as 8-bit PNG.")
@click.option("--overlays", is_flag=True, help="Write each image with the outline of its mask too.")
@click.option(
    "--tiles/--whole",
    default=None,
    help="By overlapping tiles at the image's own resolution, or the whole image resized (default: as trained).",
)
@click.option(
    "--ensemble/--single",
    default=None,
    help="By the networks of the folds together, or by the retrained one (default: as `final` chose).",
)
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: all cores).")
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
    tiles: bool | None,
    ensemble: bool | None,
    device: str,
    threads: int | None,
) -> int:
    """Predict the masks of image files, folders or globs: `<name>_segmentation.png`, 0 and 255, of each image's size.

    Files that cannot be read are named and passed over; the exit code is then 1.

    \b
        hpsearch predict photos --out-dir masks --overlays
        hpsearch predict 'visits/**/*.jpg' --model studies/isic2017/final/trial-0017
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from hpsearch.inference.predictor import Ensemble, find_images, find_model, load_predictor, predict_files

    console = Console(highlight=False, soft_wrap=True)
    images = find_images(files)
    weights = find_model(project, study_name, model)
    predictor = load_predictor(weights, device=device, threads=threads, tiles=tiles, ensemble=ensemble)
    how = "overlapping tiles" if predictor.tiles else "the whole image"
    height, width = predictor.info.size
    what = f"ensemble of {len(predictor.members)}" if isinstance(predictor, Ensemble) else "one network"
    console.print(
        Text(f"{len(images)} image{'s' if len(images) > 1 else ''}, {weights} ({what}), {how} at {height}x{width}")
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("predicting", total=len(images))

        def on_image(done: int, total: int, path: Path, reason: str | None) -> None:
            progress.update(task, completed=done, description=f"predicting {done}/{total}")
            if reason is not None:
                progress.console.print(Text(f"passed over: {printable(reason)}"))

        bad = predict_files(
            predictor, images, out_dir, probabilities=probabilities, overlays=overlays, on_image=on_image
        )
    n_masks = len(images) - len(bad)
    console.print(Text(f"{n_masks} mask{'s' if n_masks != 1 else ''} in {out_dir}"))
    if bad:
        console.print(Text(f"{len(bad)} of {len(images)} files could not be read:"))
        for path in bad:
            console.print(Text(f"  {printable(path)}"))
    return 1 if bad else 0
