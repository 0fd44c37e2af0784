"""Enqueued configurations: read from TOML, checked, and kept with the study in order."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.config import SECTIONS, StudyConfig, get_setting
from hpsearch.errors import ConfigError, RecordError
from hpsearch.search.space import default_params, encode
from hpsearch.store.files import CHANGEABLE
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.user_files import read_text


def read_params(path: Path, config: StudyConfig) -> dict[str, Any]:
    """Return the params of the configuration in a TOML file; missing settings have their defaults.

    Raises ConfigError, naming file and key, for what is unknown, lies outside the search, or is not searched and
    differs from the study's.
    """
    text = read_text(path, "--enqueue", ConfigError)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--enqueue {path} cannot be read as TOML: {error}") from error
    try:
        wanted = _merged(config, table)
    except ConfigError as error:
        raise ConfigError(f"--enqueue {path}: {error}") from error
    before, after = config.absolute().flat(), wanted.absolute().flat()
    for name, value in after.items():
        if name in config.search:
            dimension = config.search.dimensions[name]
            if not dimension.contains(get_setting(wanted, name)):
                raise ConfigError(f"--enqueue {path}: {name} = {value} lies outside the search {dimension.to_toml()}")
        elif value != before[name] and name not in CHANGEABLE:
            raise ConfigError(
                f"--enqueue {path}: {name} = {value} is not searched and is {before[name]} in this study"
            )
    return {name: get_setting(wanted, name) for name, _ in config.search}


def add(record: StudyRecord, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Enqueue these params, each once over all starts; return what became of each, in a few words."""
    entries = read(record)
    said = []
    for params in wanted:
        known = {_key(trial.params): trial.number for trial in reversed(record.trials())}
        known.setdefault(_key(default_params(record.config)), 0)
        if (number := known.get(_key(params))) is not None:
            said.append(f"is trial {number} already")
        elif _key(params) in map(_key, entries):
            said.append("is enqueued already")
        else:
            entries.append(dict(params))
            said.append("is enqueued")
    if wanted:
        paths.write_json(record.paths.enqueued, {"params": entries})
    return said


def read(record: StudyRecord) -> list[dict[str, Any]]:
    """Return all params that were ever enqueued, in order."""
    if not record.paths.enqueued.is_file():
        return []
    table = paths.read_json(record.paths.enqueued)
    try:
        return list(table["params"])
    except (KeyError, TypeError) as error:
        raise RecordError(f"{record.paths.enqueued} is damaged: {error}") from error


def next_params(record: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Return the first enqueued params that no recorded trial has; None if there are none."""
    had = {_key(trial.params) for trial in trials}
    return next((params for params in read(record) if _key(params) not in had), None)


def is_same(params: Mapping[str, Any], others: Mapping[str, Any] | None) -> bool:
    return others is not None and _key(params) == _key(others)


def _merged(config: StudyConfig, table: Mapping[str, Any]) -> StudyConfig:
    base = {**config.to_dict(), "search": {}}
    for section, values in table.items():
        if section == "search":
            continue
        if section in SECTIONS and isinstance(values, Mapping):
            values = {**base[section], **values}
        base[section] = values
    return configs.from_dict(base)


def _key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, encode(value)) for name, value in params.items()))
