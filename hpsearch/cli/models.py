"""`hpsearch predict` and `hpsearch export`: predict masks, and export retrained models and configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import hpsearch
from hpsearch.cli import options
from hpsearch.cli.options import FOLDER, model_option, study_options
from hpsearch.cli.terminal import counter
from hpsearch.errors import ConfigError
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.report.formats import count
from hpsearch.user_files import printable

_DEFAULT = "-"


@click.command("predict")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@model_option
@click.option("--out-dir", default="predictions", type=FOLDER, help="Write the masks here (default: predictions).")
@click.option("--probabilities", is_flag=True, help="Also write the probabilities as 8-bit PNG files.")
@click.option("--overlays", is_flag=True, help="Also write each image with the outline of its mask.")
@click.option(
    "--tiles/--whole",
    default=None,
    help="Predict overlapping tiles or the resized whole image (default: tiles if the model was trained on crops).",
)
@click.option(
    "--ensemble/--single", default=None, help="Use the fold ensemble or one network (default: as `final` selected)."
)
@options.device_option
@options.threads_option
@study_options
def predict(
    project: ProjectPaths,
    study_name: str | None,
    files: tuple[str, ...],
    model: str | None,
    out_dir: Path,
    probabilities: bool,
    overlays: bool,
    **how: Any,
) -> int:
    """Predict masks for image files, folders of images, or globs.

    Each mask is written as `<name>_segmentation.png` with the values 0 and 255, at the size of its image. Files that
    cannot be read are listed and skipped; the exit code is then 1.

    By default, a model that was trained on crops (`data.match = "crop"` or `augment.crop`) predicts overlapping tiles
    of an image, and any other model predicts the whole image, resized as in training.

    \b
        hpsearch predict photos --out-dir predictions --overlays
        hpsearch predict 'visits/**/*.jpg' --model studies/isic2017/final/trial-0017
    """
    from hpsearch.inference.predictor import Ensemble, load_predictor
    from hpsearch.store.record import StudyRecord
    from hpsearch.typed_json import from_json
    from hpsearch.workers.plan import ExecutionPlan

    images = hpsearch.find_images(files)
    weights = hpsearch.find_model(project, study_name, model)
    study = StudyPaths(weights.absolute().parent.parent.parent)
    if study.toml.is_file():
        record = StudyRecord.open(study)
        if out_dir.exists() and (masks := record.config.data.masks) and out_dir.resolve() == Path(masks).resolve():
            raise ConfigError(
                f"--out-dir {out_dir} contains the true masks of study {study.name!r}: choose another folder"
            )
        # Use as many threads as a single fit. On a busy machine, more threads can be many times slower.
        plan = record.plan()
        how["threads"] = how["threads"] or (from_json(ExecutionPlan, plan).alone.threads if plan else None)
    predictor = load_predictor(weights, **how)
    parts = "overlapping tiles" if predictor.tiles else "the whole image"
    height, width = predictor.info.size
    networks = f"ensemble of {len(predictor.members)}" if isinstance(predictor, Ensemble) else "one network"
    click.echo(f"{count(len(images), 'image')}, {weights} ({networks}), {parts} at {height}x{width}")
    show = counter("predicting")
    extra = {"probabilities": probabilities, "overlays": overlays}
    bad = hpsearch.predict_files(predictor, images, out_dir, on_image=lambda *now: show(*now[:2]), **extra)
    click.echo(f"{count(len(images) - len(bad), 'mask')} in {out_dir}")
    if bad:
        names = [f"{len(bad)} of {len(images)} files could not be read:", *map(printable, bad.values())]
        click.echo("\n  ".join(names))
    return 1 if bad else 0


def _file_option(flag: str, text: str) -> Callable[[options.Command], options.Command]:
    return click.option(flag, is_flag=False, flag_value=_DEFAULT, metavar="[FILE]", help=text)


@click.command("export")
@_file_option("--onnx", "Write the network as ONNX (default: model.onnx beside its weights).")
@_file_option("--toml", "Write the configuration as TOML (default: trial-<number>.toml in the study's folder).")
@model_option
@click.option("--trial", type=options.AT_LEAST_0, help="Select the trial for --toml (default: the best).")
@study_options
def export(
    project: ProjectPaths,
    study_name: str | None,
    onnx: str | None,
    toml: str | None,
    model: str | None,
    trial: int | None,
) -> None:
    """Export a retrained model (ONNX) or a trial's configuration (TOML).

    The logits of the ONNX model are compared with those of PyTorch before the file is kept. Its metadata describes
    how to prepare images and how to turn logits into masks. ONNX needs `pip install 'hpsearch[onnx]'`. `hpsearch
    train --config FILE` trains an exported configuration.

    \b
        hpsearch export --onnx
        hpsearch export --toml best.toml --study isic2017-64
    """
    if onnx is None and toml is None:
        raise click.UsageError("specify --onnx, --toml or both")
    if toml is not None:
        path = None if toml == _DEFAULT else Path(toml).expanduser()
        written = hpsearch.export_toml(hpsearch.study_record(project, study_name), path, number=trial)
        click.echo(f"configuration: {written}")
    if onnx is not None:
        weights = hpsearch.find_model(project, study_name, model)
        path = weights.with_suffix(".onnx") if onnx == _DEFAULT else Path(onnx).expanduser()
        difference = hpsearch.export_onnx(weights, path)
        click.echo(f"model: {path} (its logits differ from those of PyTorch by at most {difference:.0e})")
