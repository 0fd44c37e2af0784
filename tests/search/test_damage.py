"""Every kind of file that a study keeps, torn and changed: named or mended, no traceback, no wrong result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from hpsearch.errors import CheckpointError, HpsearchError, RecordError
from hpsearch.paths import ProjectPaths
from hpsearch.report.trial_rows import trial_cases
from hpsearch.store.record import StudyRecord
from hpsearch.training.checkpoint import load_checkpoint, load_weights
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = {
    "settings": "studies/tiny/study.toml",
    "plan": "studies/tiny/plan.json",
    "folds": "studies/tiny/folds.json",
    "log": "studies/tiny/study.log",
    "lock": "studies/tiny/study.lock",
    "holder": "studies/tiny/holder.json",
    "trial": "studies/tiny/trials/0000/trial.json",
    "epochs": "studies/tiny/trials/0000/fold1/epochs.jsonl",
    "scores": "studies/tiny/trials/0000/fold1/scores.npy",
    "counts": "studies/tiny/trials/0000/fold1/counts.npy",
    "examples": "studies/tiny/trials/0000/fold1/examples.npz",
    "fit": "studies/tiny/trials/0000/fold1/fit.json",
    "weights": "studies/tiny/trials/0000/fold1/weights.safetensors",
    "best weights": "studies/tiny/trials/0000/fold1/best.pt",
    "database": "hpsearch.db",
    "cache index": "cache/*-memmap/index.json",
    "cached images": "cache/*-memmap/images.npy",
    "cached masks": "cache/*-memmap/masks.npy",
}
Damage = Callable[[bytes], bytes]


def cut(share: float) -> Damage:
    return lambda content: content[: int(len(content) * share)]


def flip(share: float) -> Damage:
    """One bit of one byte, so that a digit stays a digit."""

    return lambda content: flip_at(int(len(content) * share), content) if content else b"\x01"


def flip_at(at: int, content: bytes) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "emptied": cut(0.0),
    "cut in the middle": cut(0.5),
    "changed near the start": flip(0.1),
    "changed near the end": flip(0.93),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sound(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a study that is done; not to be changed."""
    project = tmp_path_factory.mktemp("sound")
    run(project, tiny_config(dataset, "study.trials=2", "study.pruner=none"))
    # As a coordinator that was killed leaves it.
    (project / "studies/tiny/holder.json").write_text('{"pid": 1, "host": "lab", "since": 0.0}')
    return project


def everything_read(project: Path) -> dict[str, Any]:
    """All that can be concluded from a study, its weights, examples and cached images included."""
    record = StudyRecord.open(ProjectPaths(project).study("tiny"))
    read = everything(record)
    read["best"] = record.best()
    for number in record.trial_numbers():
        read[f"cases {number}"] = [str(vars(case)) for case in trial_cases(record, number)]
        for fold in range(record.n_folds):
            fit = record.fit(number, fold)
            read[f"fit {number} {fold}"] = (fit.summary(), fit.epochs(), fit.counts().tolist())
            if fit.paths.weights.is_file():
                state = load_weights(fit.paths.weights)[0].state_dict()
                read[f"weights {number} {fold}"] = {name: value.tolist() for name, value in state.items()}
            if fit.paths.best.is_file():
                read[f"best {number} {fold}"] = str(load_checkpoint(fit.paths.best))
    for path in sorted(project.glob("cache/*/*.npy")):
        read[path.name] = np.load(path).tolist()
    return read


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named_or_mended_and_never_believed(
    kind: str, damage: str, sound: Path, dataset: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(sound, project)
    (path,) = project.glob(FILES[kind])
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    try:
        run(project, tiny_config(dataset, "study.trials=2", "study.pruner=none"))
        found = everything_read(project)
    except HpsearchError as error:
        assert "\n" not in str(error)
        assert path.name in str(error)
    else:
        assert found == everything_read(sound)


@pytest.mark.parametrize("torn", ["last.pt", "last.pt and previous.pt"])
def test_an_open_fit_goes_on_from_what_is_sound_of_it(dataset: Path, tmp_path: Path, torn: str) -> None:
    from tests.search.test_coordinator import Stop, _StopAfter

    config = tiny_config(dataset, "study.trials=1", "train.epochs=4")
    never = everything(run(tmp_path / "never", config).record)
    stop = Stop()
    record = run(tmp_path / "stopped", config, stop=stop, callback=_StopAfter(stop, 3)).record
    fit = record.fit(0, 0).paths
    for path in (fit.epochs, fit.scores):
        path.write_bytes(flip(0.5)(path.read_bytes()))
    for name in torn.split(" and "):
        path = fit.root / name
        path.write_bytes(DAMAGES["cut in the middle"](path.read_bytes()))
    assert everything(run(tmp_path / "stopped", config).record) == never
    assert "skipped" in (record.paths.root / "worker0.log").read_text()


def optuna_trials(project: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{project / 'hpsearch.db'}").trials


@pytest.mark.slow
def test_the_way_out_of_damage_works(sound: Path, dataset: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(sound, project)
    config = tiny_config(dataset, "study.trials=2", "study.pruner=none")
    plan = project / FILES["plan"]
    plan.write_bytes(flip(0.5)(plan.read_bytes()))
    with pytest.raises(RecordError, match="delete it, and it is measured anew"):
        run(project, config)
    plan.unlink()
    database = project / FILES["database"]
    database.write_bytes(DAMAGES["cut in the middle"](database.read_bytes()))
    run(project, config)
    assert database.with_name("hpsearch.db.damaged").is_file()
    assert [trial.state.name for trial in optuna_trials(project)] == ["COMPLETE"] * 2
    settings = project / FILES["settings"]
    text = settings.read_text()
    settings.write_text(text.replace("epochs = 2", "epochs = 3"))
    with pytest.raises(RecordError, match="remove its first line"):
        run(project, config)
    settings.write_text(text)
    run(project, config)
    assert everything_read(project) == everything_read(sound)


def test_weights_that_were_changed_are_refused(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    content = (sound / FILES["weights"]).read_bytes()
    about_the_network = range(content.index(b'{"__metadata__"'), content.index(b'"},"') + 4)
    for at in [*about_the_network, *np.linspace(0, len(content), 50, endpoint=False, dtype=int)]:
        path.write_bytes(flip_at(at, content))
        with pytest.raises(CheckpointError):
            load_weights(path)


def test_examples_that_were_changed_are_named(sound: Path, dataset: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(sound, project)
    record = StudyRecord.open(ProjectPaths(project).study("tiny"))
    as_they_are = [str(vars(case)) for case in trial_cases(record, 0)]
    (path,) = project.glob(FILES["examples"])
    content = path.read_bytes()
    for at in np.linspace(0, len(content), 200, endpoint=False, dtype=int):
        path.write_bytes(flip_at(at, content))
        try:
            assert [str(vars(case)) for case in trial_cases(record, 0)] == as_they_are, at
        except RecordError as error:
            assert "examples.npz is damaged" in str(error), at
