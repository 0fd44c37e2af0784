"""`hpsearch export`: write a model as ONNX, or a configuration as TOML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from hpsearch.cli.options import Command, model_option, out_option, study_option
from hpsearch.paths import ProjectPaths

_DEFAULT = "-"


def _file_option(flag: str, text: str) -> Callable[[Command], Command]:
    return click.option(flag, is_flag=False, flag_value=_DEFAULT, metavar="[FILE]", help=text)


@click.command("export")
@_file_option("--onnx", "Write the network as ONNX (default: model.onnx beside its weights).")
@_file_option("--toml", "Write the configuration as TOML (default: trial-<number>.toml in the study's folder).")
@model_option
@click.option(
    "--trial", type=click.IntRange(min=0), help="Write the configuration of this trial (default: the best)."
)
@out_option
@study_option
def command(
    project: ProjectPaths,
    study_name: str | None,
    onnx: str | None,
    toml: str | None,
    model: str | None,
    trial: int | None,
) -> None:
    """Write a final model as ONNX, or a configuration as TOML.

    `hpsearch train --config FILE` runs this TOML again. The ONNX file is checked with ONNX Runtime before it is kept.
    Its metadata describe preprocessing and post-processing. ONNX needs `pip install 'hpsearch[onnx]'`.

    \b
        hpsearch export --onnx
        hpsearch export --toml best.toml --study isic2017-64
    """
    if onnx is None and toml is None:
        raise click.UsageError("give --onnx, --toml or both")

    from hpsearch.inference.export import export_onnx, export_toml
    from hpsearch.inference.predictor import find_model
    from hpsearch.store.record import study_record

    if toml is not None:
        record = study_record(project, study_name)
        click.echo(f"configuration: {export_toml(record, _given(toml), number=trial)}")
    if onnx is not None:
        weights = find_model(project, study_name, model)
        path = _given(onnx) or weights.with_suffix(".onnx")
        difference = export_onnx(weights, path)
        click.echo(f"model: {path} (its logits differ from those of PyTorch by at most {difference:.0e})")


def _given(path: str) -> Path | None:
    return None if path == _DEFAULT else Path(path).expanduser()
