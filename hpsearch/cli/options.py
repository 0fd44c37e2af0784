"""Define the options that several commands share, and convert them to a configuration."""

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import hpsearch
from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.config.values import suggestion
from hpsearch.errors import ConfigError
from hpsearch.paths import ProjectPaths, absolute, study_name_of
from hpsearch.user_files import broken_link, require_usable_path

BUILT_IN = (Path(__file__).parents[1] / "experiments", Path(__file__).parents[2] / "experiments")
"""Folders of the built-in TOML files: inside the package if it is installed, or beside it in a checkout."""
SETTING_OF = {
    name.partition(".")[2]: name for name in configs.setting_names() if name.startswith(("data.", "study."))
}
"""Maps the last part of a setting's name to the full name, such as `folds` to `study.folds`. The parameter name of an
option that sets a setting is this last part."""

AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)
FOLDER = click.Path(path_type=Path, file_okay=False)
Command = Callable[..., Any]


class OrderedGroup(click.Group):
    """Command group that lists its commands in the order in which they are typically used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _project(_ctx: click.Context, _param: click.Parameter, out: Path) -> ProjectPaths:
    require_usable_path(out, ConfigError)
    if link := broken_link(out):
        raise ConfigError(f"--out: {link}")
    with contextlib.suppress(FileNotFoundError):
        # An impossible path, such as one that is too long, raises OSError here, even if the command would write
        # nothing.
        out.stat()
    return ProjectPaths(out)


def _folds(text: str) -> int | str:
    if text != "fixed" and not text.isdecimal():
        raise click.BadParameter(f"{text!r} is neither a number of folds nor 'fixed'")
    return text if text == "fixed" else int(text)


def folds_option(default: str | None = None) -> Callable[[Command], Command]:
    """Return the option `--folds` with the given default: `fixed`, or None for the study's value."""
    fixed = "`fixed`, the default" if default else "`fixed`"
    text = f"Cross-validate with k folds, or use the dataset's training/validation split ({fixed})."
    return click.option("--folds", type=_folds, default=default, metavar="k|fixed", help=text)


out_option = click.option(
    "--out", "project", default=".", type=FOLDER, callback=_project, help="Project folder (default: current folder)."
)
tracking_option = click.option(
    "--tracking",
    metavar="URI|none",
    help="Log to MLflow at this URI, or not at all (default: MLFLOW_TRACKING_URI, else mlflow.db in --out).",
)
storage_option = click.option(
    "--storage", metavar="URL", help="Keep Optuna's database at this URL (default: sqlite:///hpsearch.db in --out)."
)
model_option = click.option(
    "--model", metavar="FOLDER|FILE", help="Use the model in this folder or file (default: the latest from `final`)."
)
device_option = click.option(
    "--device", default="auto", metavar="auto|cpu|cuda[:n]|mps|xla", help="Compute on this device (default: auto)."
)
threads_option = click.option(
    "--threads", type=AT_LEAST_1, help="Use this many threads per process (default: measured)."
)


def _cluster(context: click.Context, option: click.Parameter, address: str | None) -> str:
    """Refuse an empty address, as an unset shell variable gives it."""
    if address == "":
        raise click.BadParameter("the address is empty", context, option)
    return address or ""


cluster_option = click.option(
    "--cluster",
    callback=_cluster,
    metavar="URL",
    help="Run on the Dask cluster of this scheduler, such as tcp://host:8786.",
)
timeout_option = click.option(
    "--cluster-timeout", default=600.0, metavar="S", help="Exit after S seconds without Dask workers (default: 600)."
)


def study_options_with(default: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the options `--out` (passed as `project`) and `--study` (passed as `study_name`).

    The text `default` describes the default of `--study`.
    """
    study = click.option("--study", "study_name", metavar="NAME", help=f"Name of the study (default: {default}).")
    return lambda command: out_option(study(command))


study_options = study_options_with("the only study, or the only one that is running")


def machine_options(command: Command) -> Command:
    """Add `--device`, `--threads` and the cluster options to a command.

    Their values are passed as `machine`, together with that of `--workers` if the command has it.
    """

    @device_option
    @threads_option
    @cluster_option
    @timeout_option
    @functools.wraps(command)
    def with_machine(device: str, threads: int | None, workers: int | None = None, **rest: Any) -> Any:
        cluster = rest.pop("cluster"), rest.pop("cluster_timeout")
        return command(machine=hpsearch.MachineChoice(device, workers or 0, threads or 0, *cluster), **rest)

    return with_machine


@dataclass(frozen=True)
class Settings:
    """Settings given on the command line: a TOML file, if any, and overrides.

    `data` and `images` are the values of the options with these names.
    """

    config_file: str | None
    overrides: tuple[str, ...]
    data: str | None = None
    images: str | None = None

    @property
    def name(self) -> str:
        """Default name of the study: the name of the TOML file or, if only `images` is given, of that folder."""
        if self.images is None or self.config_file is not None:
            return self.path.stem
        require_usable_path(Path(self.images), ConfigError)
        return study_name_of(absolute(self.images))

    @property
    def path(self) -> Path:
        """Path of the TOML file to start from: the given file, or a built-in one."""
        return config_path(self.config_file or ("sample" if self.data == "sample" else "isic2017"))

    def load(self, base: Path | None = None, *, is_searched: bool = False) -> StudyConfig:
        """Load the configuration. Without `--config`, start from the TOML file `base` if it exists.

        With `is_searched`, print how the overrides change the search space.
        """
        path = base if self.config_file is None and base is not None and base.is_file() else self.path
        notes: list[str] = []
        config = configs.load(path, self.overrides, on_note=notes.append)
        for note in notes if is_searched else ():
            click.echo(f"note: {note}")
        return config


CONFIG_OPTIONS = (
    click.option(
        "--config", "config_file", metavar="FILE|NAME", help="Read settings from this file or built-in configuration."
    ),
    click.option("--set", "overrides", multiple=True, metavar="section.key=value", help="Override one setting."),
    click.option("--data", "root", metavar="DIR|sample", help="Use the dataset in this folder (data.root)."),
    click.option("--images", metavar="DIR", help="Use your own images in this folder; requires --masks."),
    click.option("--masks", metavar="DIR", help="Use the masks in this folder for --images."),
    click.option("--seed", type=int, help="Seed for folds, sampler, fits, crops and augmented copies (study.seed)."),
    click.option("--color", type=click.Choice(["rgb", "grayscale"]), help="Set the colour mode of the input."),
    click.option("--size", type=click.IntRange(min=8), help="Set height and width of the input (data.size)."),
    click.option("--exclude-bad", is_flag=True, help="Leave out images with errors instead of refusing the dataset."),
)


def config_options(command: Command) -> Command:
    """Add `--config`, `--set` and the options for single settings to a command. They are passed as `settings`."""

    @functools.wraps(command)
    def with_config(config_file: str | None, overrides: tuple[str, ...], **rest: Any) -> Any:
        given = {name: rest.pop(name) for name in SETTING_OF if name in rest}
        # Format values as JSON: numbers, strings and booleans have the same syntax in TOML.
        # Do not test `in (None, False)`, because 0 equals False.
        chosen = {
            SETTING_OF[name]: value for name, value in given.items() if value is not None and value is not False
        }
        flags = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in chosen.items()]
        return command(settings=Settings(config_file, (*flags, *overrides), given["root"], given["images"]), **rest)

    for option in reversed(CONFIG_OPTIONS):
        with_config = option(with_config)
    return with_config


def config_path(name: str) -> Path:
    """Return the path of the TOML file `name`, or of the built-in configuration with this name.

    Raises ConfigError if there is neither.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    built_in = {path.stem: path for folder in reversed(BUILT_IN) for path in folder.glob("*.toml")}
    if name in built_in:
        return built_in[name]
    known, hint = ", ".join(sorted(built_in)), suggestion(name, built_in)
    raise ConfigError(f"--config {name}: no file or built-in configuration has this name{hint}; built in: {known}")
