"""`hpsearch export`: a model as ONNX, a configuration as TOML."""

from __future__ import annotations

from pathlib import Path

import click

from hpsearch.cli.options import out_option, study_option
from hpsearch.paths import ProjectPaths

_DEFAULT = "-"


@click.command("export")
@click.option(
    "--onnx",
    is_flag=False,
    flag_value=_DEFAULT,
    metavar="[FILE]",
    help="Write the network as ONNX (default: model.onnx beside its weights).",
)
@click.option(
    "--toml",
    is_flag=False,
    flag_value=_DEFAULT,
    metavar="[FILE]",
    help="Write the configuration as TOML (default: trial-<number>.toml in the study's folder).",
)
@click.option(
    "--model",
    metavar="FOLDER|FILE",
    help="For --onnx: a folder of `final`, or a weights file (default: the study's latest final).",
)
@click.option("--trial", type=click.IntRange(min=0), help="For --toml: this trial (default: the best).")
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
    """Export a final model as ONNX, or the best configuration as a TOML that `hpsearch train` runs again.

    The ONNX file is checked in ONNX Runtime before it appears; its metadata say what comes before and after it. It
    takes the packages of `pip install 'hpsearch[onnx]'`.

    \b
        hpsearch export --onnx
        hpsearch export --toml best.toml --study isic2017-64
    """
    if onnx is None and toml is None:
        raise click.UsageError("say what to export: --onnx, --toml or both")

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
        click.echo(f"model: {path} (its logits are torch's to {difference:.0e})")


def _given(path: str) -> Path | None:
    return None if path == _DEFAULT else Path(path).expanduser()
