"""Options that several commands share, and how they become a configuration."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.errors import ConfigError
from hpsearch.paths import ProjectPaths, absolute, study_name_of
from hpsearch.user_files import broken_link, require_usable_path

SHIPPED = (Path(__file__).parents[1] / "experiments", Path(__file__).parents[2] / "experiments")
"""Where the shipped studies lie: inside an installed package, or beside it in a checkout."""

Command = Callable[..., Any]


def out_option(command: Command) -> Command:
    """`--out`, as the project it names."""

    @click.option(
        "--out",
        default=".",
        type=click.Path(path_type=Path, file_okay=False),
        help="Project folder (default: here).",
    )
    @functools.wraps(command)
    def with_project(out: Path, **rest: Any) -> Any:
        require_usable_path(out, ConfigError)
        if link := broken_link(out):
            raise ConfigError(f"--out: {link}")
        return command(project=ProjectPaths(out), **rest)

    return with_project


study_option = click.option("--study", "study_name", metavar="NAME", help="Name of the study.")
tracking_option = click.option(
    "--tracking", metavar="URI|none", help="MLflow tracking URI; none: no tracking (default: mlflow.db in --out)."
)
device_option = click.option(
    "--device", default="auto", metavar="auto|cpu|cuda[:n]|mps|xla", help="Where to train (default: auto)."
)


@dataclass(frozen=True)
class Settings:
    """What the user gave: a TOML file, or none, and overrides on top of it."""

    config_file: str | None
    overrides: tuple[str, ...]
    is_sample: bool
    images: str | None = None

    @property
    def name(self) -> str:
        """The study's name where none is given: the folder of one's own images, else the TOML file's stem."""
        if self.images is None or self.config_file is not None:
            return self.path.stem
        folder = absolute(self.images)
        require_usable_path(folder, ConfigError)
        return study_name_of(folder)

    @property
    def path(self) -> Path:
        """The TOML file to start from: the one given, else the shipped default."""
        return config_path(self.config_file or ("sample" if self.is_sample else "isic2017"))

    def load(self, base: Path | None = None, *, is_searched: bool = False) -> StudyConfig:
        """The configuration; without `--config`, on top of the TOML at `base` if there is one.

        If it `is_searched`, what the overrides change in the search space is printed.
        """
        path = base if self.config_file is None and base is not None and base.is_file() else self.path
        notes: list[str] = []
        config = configs.load(path, self.overrides, on_note=notes.append)
        for note in notes if is_searched else ():
            click.echo(f"note: {note}")
        return config


def config_options(command: Command) -> Command:
    """`--config`, `--set` and the flags for single settings, as one `settings` argument."""
    options = [
        click.option(
            "--config", "config_file", metavar="FILE|NAME", help="A TOML file, or the name of a shipped one."
        ),
        click.option("--set", "overrides", multiple=True, metavar="section.key=value", help="Override one setting."),
        click.option("--data", metavar="DIR|sample", help="Folder of the dataset (data.root)."),
        click.option("--images", metavar="DIR", help="Folder of your own images; needs --masks."),
        click.option("--masks", metavar="DIR", help="Folder of the masks of --images."),
        click.option("--seed", type=int, help="Seed of folds, suggestions and fits (study.seed)."),
        click.option("--color", type=click.Choice(["rgb", "grayscale"]), help="Channels that the network sees."),
        click.option(
            "--size", type=click.IntRange(min=8), help="Height and width that the network sees (data.size)."
        ),
        click.option("--exclude-bad", is_flag=True, help="Leave out images with errors instead of refusing."),
    ]

    @functools.wraps(command)
    def with_config(
        config_file: str | None,
        overrides: tuple[str, ...],
        data: str | None,
        images: str | None,
        masks: str | None,
        seed: int | None,
        exclude_bad: bool,
        color: str | None,
        size: int | None,
        **rest: Any,
    ) -> Any:
        flags: dict[str, Any] = {"data.root": data, "data.images": images, "data.masks": masks, "study.seed": seed}
        flags |= {"data.color": color, "data.size": size}
        flags["data.exclude_bad"] = exclude_bad or None
        flags["data.groups"] = rest.pop("groups", None)
        flags["data.group_duplicates"] = rest.pop("group_duplicates", None) or None
        flags["study.allow_microbatch"] = rest.pop("allow_microbatch", None) or None
        flags["study.lookahead"] = rest.pop("lookahead", None)
        for setting in ("trials", "folds", "sampler", "pruner", "metric", "confirm"):
            flags[f"study.{setting}"] = rest.pop(setting, None)
        given = [f"{name}={_toml(value)}" for name, value in flags.items() if value is not None]
        settings = Settings(config_file, (*given, *overrides), data == "sample", images)
        return command(settings=settings, **rest)

    for option in reversed(options):
        with_config = option(with_config)
    return with_config


def config_path(name: str) -> Path:
    """The file `name`, or the shipped study of that name; ConfigError lists those if it is neither."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    for folder in SHIPPED:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    shipped = sorted({path.stem for folder in SHIPPED for path in folder.glob("*.toml")})
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"--config {name}: there is no such file, and no shipped study of that name ({', '.join(shipped)}){hint}"
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    # A folder whose name looks like a number or a list must stay a string. JSON's strings are TOML's.
    return json.dumps(value, ensure_ascii=False)
