"""Create the next trial of a study, from enqueued params or from the sampler, until the search space is used up."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpsearch import paths
from hpsearch.config import StudyConfig, get_setting
from hpsearch.errors import ConfigError, RecordError, StudyError
from hpsearch.search.suggest import suggest
from hpsearch.store.files import CHANGEABLE
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord, count_trials
from hpsearch.store.versions import code_version, now
from hpsearch.user_files import read_text
from hpsearch.workers.plan import ExecutionPlan, Infeasible, why_infeasible

INFEASIBLE_PER_TRIAL = 10
"""Number of infeasible suggestions that are allowed per requested trial."""


def next_trial(
    record: StudyRecord, trials: Mapping[int, TrialRecord], plan: ExecutionPlan, true_means: Mapping[int, float]
) -> tuple[TrialRecord, Infeasible | None]:
    """Return the next trial, and the reason why it cannot be trained (None if it can).

    `true_means` contains the estimated mean scores that the sampler receives instead of the trials' values.
    Raises StudyError if too many suggestions were infeasible.
    """
    history = [trials[number] for number in sorted(trials)]
    infeasible = [trial for trial in history if trial.outcome == "infeasible"]
    if len(infeasible) >= INFEASIBLE_PER_TRIAL * record.config.study.trials:
        raise StudyError(
            f"{len(infeasible)} suggested configurations were infeasible, the last one because "
            f"{infeasible[-1].reason}; reduce the search space, or change data.size"
        )
    number = history[-1].number + 1 if history else 0
    wanted = next_params(record, history)
    params = suggest(record.config, _as_estimated(history, true_means), number, wanted)
    try:
        config = record.config.with_params(params)
        why = why_infeasible(config, plan)
    except ConfigError as error:
        config, why = record.config.with_params({}), Infeasible(str(error), 1.0)
    trial = TrialRecord(
        number=number,
        params=params,
        config=config.to_dict(),
        began_at=now(),
        source="default" if number == 0 else "enqueued" if wanted else "sampler",
        code=code_version(),
    )
    return trial, why


def _as_estimated(trials: Sequence[TrialRecord], true_means: Mapping[int, float]) -> list[TrialRecord]:
    """Return the trials with their estimated mean scores as values. Open trials with an estimate count as pruned."""
    return [
        dataclasses.replace(each, outcome=each.outcome or "pruned", value=true_means[each.number])
        if each.number in true_means
        else each
        for each in trials
    ]


def end_early(record: StudyRecord, trials: Mapping[int, TrialRecord]) -> str:
    """Return why the search ends before all requested trials are evaluated, or "" if they all are.

    Called when no trial is left to start. If unused configurations remain (`study.until_gain`), `study.trials` is
    first lowered to the number of evaluated trials. Raises StudyError if no configuration of the search space is
    feasible.
    """
    n_counted, config = count_trials(trials.values()), record.config
    if n_counted >= config.study.trials:
        return ""
    if record.n_unused(trials.values()) != 0:
        # The smaller number is stored, so that the study is finished for all that read its settings.
        fewer = dataclasses.replace(config.study, trials=n_counted)
        record.update_config(dataclasses.replace(config, study=fewer))
        return (
            f"the search ends after {n_counted} of {config.study.trials} trials: the others are unlikely to improve "
            f"the score by {config.study.until_gain:g}"
        )
    if all(trial.outcome == "infeasible" for trial in trials.values()):
        reason = trials[max(trials)].reason
        raise StudyError(f"every configuration is infeasible, the last because {reason}: change the search space")
    return (
        "the search space is used up: every configuration has been tried, so the search ends with "
        f"{n_counted} of {config.study.trials} trials"
    )


def read_params(path: Path, config: StudyConfig) -> dict[str, Any]:
    """Return the params of the configuration in a TOML file, which are the values of the searched settings.

    Settings that are not in the file keep the study's values.

    Raises ConfigError, naming the file and the key, if a setting is unknown, lies outside the search space, or is not
    searched and differs from the study's value.
    """
    base = config.to_dict()
    text = read_text(path, "--enqueue", ConfigError)
    try:
        for section, values in tomllib.loads(text).items():
            base[section] = {**base.get(section, {}), **values} if isinstance(values, Mapping) else values
        wanted = StudyConfig.from_dict({**base, "search": {}})
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--enqueue {path} cannot be read as TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"--enqueue {path}: {error}") from error
    before = config.absolute().flat()
    for name, value in wanted.absolute().flat().items():
        dimension, fault = config.search.get(name), ""
        if dimension is not None and not dimension.contains(get_setting(wanted, name)):
            fault = f"lies outside the search {dimension.to_toml()}"
        elif dimension is None and value != before[name] and name not in CHANGEABLE:
            fault = f"is not searched and is {before[name]} in this study"
        if fault:
            raise ConfigError(f"--enqueue {path}: {name} = {value} {fault}")
    return {name: get_setting(wanted, name) for name in config.search}


def enqueue(record: StudyRecord, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Enqueue params that were neither tried nor enqueued before. Return a short status text for each of them."""
    entries, said = _enqueued(record), []
    known = {record.configuration(params): "is already enqueued" for params in entries}
    for trial in reversed(record.trials()):
        known[record.configuration(trial.params)] = f"is already trial {trial.number}"
    known[record.configuration({})] = "is already trial 0"
    for params in wanted:
        key = record.configuration(params)
        said.append(known.get(key, "is enqueued"))
        if key not in known:
            entries.append(dict(params))
            known[key] = "is already enqueued"
    if wanted:
        paths.write_json(record.paths.enqueued, {"params": entries})
    return said


def next_params(record: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Return the first enqueued params that no recorded trial has used; None if there are none."""
    entries = _enqueued(record)
    had = {record.configuration(trial.params) for trial in (trials if entries else ())}
    return next((params for params in entries if record.configuration(params) not in had), None)


def _enqueued(record: StudyRecord) -> list[dict[str, Any]]:
    """Return all params that were ever enqueued, in order."""
    path = record.paths.enqueued
    table = paths.read_json(path) if path.is_file() else {"params": []}
    params = table.get("params") if isinstance(table, dict) else None
    if not isinstance(params, list):
        raise RecordError(f"{path} is damaged: delete it and enqueue the configurations again")
    return params
