import hashlib
import io
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hpsearch import paths
from hpsearch.config.model import UNetConfig
from hpsearch.errors import CheckpointError, StorageError
from hpsearch.models.unet import UNet
from hpsearch.paths import FitPaths
from hpsearch.training import checkpoint
from hpsearch.training.checkpoint import (
    WeightsInfo,
    load_checkpoint,
    load_latest,
    load_weights,
    save_checkpoint,
    save_weights,
)
from tests.training.fakes import NORMALIZATION

STATE = {
    "epoch": 3,
    "digest": "ab",
    "model": {"w": torch.arange(6.0).reshape(2, 3)},
    "rows": [{"epoch": 1, "held_out": None}],
    "rng": {"python": (3, (1, 2, 3), None)},
}
INFO = WeightsInfo(
    model=UNetConfig(base_channels=2, depth=1, stacking=1),
    in_channels=3,
    normalization=NORMALIZATION,
    size=(16, 24),
    extra={"name": 'a "quoted" <b>é</b>'},
)


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def fit(tmp_path) -> FitPaths:
    return FitPaths(tmp_path / "fold0")


@pytest.fixture
def model() -> UNet:
    return UNet(INFO.model, INFO.in_channels, seed=1)


def save_latest(fit: FitPaths, state: dict) -> None:
    save_checkpoint(fit.last, state, previous=fit.previous)


def checkpoint_with_checksum(payload: bytes) -> bytes:
    return b"hpsearch checkpoint\n" + hashlib.sha256(payload).digest() + payload


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path):
    save_checkpoint(tmp_path / "a.pt", STATE)
    state = load_checkpoint(tmp_path / "a.pt")
    torch.testing.assert_close(state.pop("model"), STATE["model"], rtol=0, atol=0)
    assert state.pop("format") == checkpoint.FORMAT
    assert state == {key: value for key, value in STATE.items() if key != "model"}


@pytest.mark.parametrize("where", [0.0, 0.3, 0.95])
def test_a_truncated_checkpoint_is_refused(where, tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * where)])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("where", [0.001, 0.02, 0.5, 0.999])
def test_one_flipped_bit_is_noticed(where, tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save_checkpoint(tmp_path / "a.pt", STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99"):
        load_checkpoint(tmp_path / "a.pt")


def test_pickle_opcodes_are_refused_and_never_run_even_behind_a_right_checksum(tmp_path):
    marker = tmp_path / "code-ran"
    zipped = io.BytesIO()
    torch.save({"format": 1, "model": RunsCode(marker)}, zipped)
    bare = pickle.dumps(RunsCode(marker), protocol=2)
    path = tmp_path / "a.pt"
    for payload in (zipped.getvalue(), bare):
        path.write_bytes(checkpoint_with_checksum(payload))
        with pytest.raises(CheckpointError, match="more than tensors and plain types"):
            load_checkpoint(path)
        path.write_bytes(payload)
        with pytest.raises(CheckpointError, match="is not a complete checkpoint of hpsearch"):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match="cannot be read as a complete safetensors file"):
            load_weights(path)
    assert not marker.exists()


def test_a_pickle_in_place_of_the_last_checkpoint_is_passed_over(fit, tmp_path, caplog):
    save_latest(fit, STATE)
    fit.last.replace(fit.previous)
    fit.last.write_bytes(pickle.dumps(RunsCode(tmp_path / "code-ran")))
    state = load_latest(fit, "ab")
    assert state is not None
    assert len(caplog.messages) == 1
    assert not (tmp_path / "code-ran").exists()


def test_the_last_good_checkpoint_stays_beside_the_new_one(fit):
    for epoch in (1, 2, 3):
        save_latest(fit, {**STATE, "epoch": epoch})
    assert load_checkpoint(fit.last)["epoch"] == 3
    assert load_checkpoint(fit.previous)["epoch"] == 2
    assert sorted(path.name for path in fit.root.iterdir()) == ["last.pt", "previous.pt"]


def test_a_torn_last_checkpoint_is_reported_and_passed_over_for_the_previous(fit, caplog):
    save_latest(fit, {**STATE, "epoch": 1})
    save_latest(fit, {**STATE, "epoch": 2})
    fit.last.write_bytes(fit.last.read_bytes()[:-10])
    state = load_latest(fit, "ab")
    assert state is not None
    assert state["epoch"] == 1
    assert [str(fit.last) in line for line in caplog.messages] == [True]


def test_without_a_good_checkpoint_there_is_none(fit, caplog):
    assert load_latest(fit, "ab") is None
    fit.root.mkdir()
    fit.last.write_bytes(b"")
    fit.previous.write_bytes(b"x")
    state = load_latest(fit, "ab")
    assert state is None
    assert len(caplog.messages) == 2


def test_a_disk_that_loses_bytes_costs_the_new_checkpoint_and_not_the_old(fit, monkeypatch):
    save_latest(fit, {**STATE, "epoch": 1})
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"something else")
    with pytest.raises(StorageError, match=r"last\.pt"):
        save_latest(fit, {**STATE, "epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(fit.last)["epoch"] == 1
    assert [path.name for path in fit.root.iterdir()] == ["last.pt"]


def test_killed_between_the_two_renames_the_previous_is_found(fit, monkeypatch, caplog):
    save_latest(fit, {**STATE, "epoch": 1})
    rename = Path.replace

    def die_after_the_first(self, target):
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        save_latest(fit, {**STATE, "epoch": 2})
    monkeypatch.undo()
    state = load_latest(fit, "ab")
    assert state is not None
    assert state["epoch"] == 1
    assert caplog.messages == []


def test_weights_are_read_back_with_all_that_is_needed_to_use_them(model, tmp_path):
    save_weights(tmp_path / "w.safetensors", model, INFO)
    loaded, info = load_weights(tmp_path / "w.safetensors")
    assert info == INFO
    assert not loaded.training
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("extra", "sees_windows"),
    [({}, False), ({"match": "resize"}, False), ({"match": "crop"}, True), ({"frame": [9, 9]}, True)],
)
def test_a_network_of_windows_is_loaded_without_stretching(extra, sees_windows, tmp_path):
    config = UNetConfig(base_channels=2, depth=1, stacking=1, padding="valid", norm="none")
    info = WeightsInfo(model=config, in_channels=3, normalization=NORMALIZATION, size=(16, 16), extra=extra)
    save_weights(tmp_path / "w.safetensors", UNet(config, 3), info)
    network, found = load_weights(tmp_path / "w.safetensors")
    assert found.sees_windows == sees_windows
    assert network(torch.zeros(1, 3, 16, 16)).shape[-1] == (8 if sees_windows else 16)
    assert not network.training


def test_equal_weights_give_equal_bytes(model, tmp_path):
    save_weights(tmp_path / "a.safetensors", model, INFO)
    save_weights(tmp_path / "b.safetensors", model.to(memory_format=torch.channels_last), INFO)
    assert paths.sha256_file(tmp_path / "a.safetensors") == paths.sha256_file(tmp_path / "b.safetensors")


def test_torn_weights_are_refused(model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, INFO)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            load_weights(path)


def test_a_changed_weight_is_noticed(model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, INFO)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        load_weights(path)


def test_missing_weights_are_an_error_that_names_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        load_weights(tmp_path / "none.safetensors")


def test_weights_of_other_programs_are_refused(model, tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="not a weights file of hpsearch"):
        load_weights(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"model": {"depth": 0}},
        {"model": {"width": 3}},
        {"size": 16},
        {"normalization": {}},
        {"in_channels": "many"},
        {"model": {"base_channels": 4, "depth": 1, "stacking": 1}},
    ],
)
def test_weights_that_contradict_their_description_are_refused(change, model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, INFO)
    with safetensors.safe_open(path, framework="pt") as file:
        table = json.loads(file.metadata()["hpsearch"])
    content = safetensors.torch.save(model.state_dict(), {"hpsearch": json.dumps({**table, **change})})
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_weights(path)


def test_an_unwritable_folder_is_a_storage_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_weights(tmp_path / "file" / "w.safetensors", model, INFO)
    with pytest.raises(StorageError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "a.pt", STATE)


def test_the_checkpoint_of_another_fit_is_never_continued(fit):
    save_latest(fit, STATE)
    state = load_latest(fit, "ab")
    assert state is not None
    assert state["digest"] == "ab"
    save_latest(fit, {**STATE, "digest": "of another fit"})
    with pytest.raises(CheckpointError, match="remove the folder"):
        load_latest(fit, "ab")
