"""A fit on a GPU: run with `pytest -m gpu` where there is one."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from hpsearch.config.data import AugmentConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.errors import OutOfMemoryError
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as devices
from hpsearch.training.runtime import make_runtime
from tests.training.fakes import FakeCache, fit, fit_arguments, make_data

pytestmark = pytest.mark.gpu


def arguments(**changes):
    amp = changes.pop("amp", "auto")
    data = make_data(
        changes.pop("cache", FakeCache()), device="cuda", resident_share=changes.pop("resident_share", 0.25)
    )
    return fit_arguments(**{"data": data, "runtime": make_runtime("cuda", amp=amp, compile="off"), **changes})


@pytest.mark.parametrize("amp", ["auto", "fp16", "off"])
def test_a_fit_on_cuda_learns_and_resumes(amp, tmp_path):
    train = TrainConfig(epochs=12, batch_size=4, lr=0.1)
    model = UNetConfig(base_channels=4, depth=2)
    paths = FitPaths(tmp_path / "fold0")
    fit(**arguments(amp=amp, train=train, model_config=model), paths=paths, on_epoch=lambda *_: "stop")
    result = fit(**arguments(amp=amp, train=train, model_config=model), paths=paths)
    assert result.scores[-1].mean() > 0.9
    assert result.rows[-1].peak_bytes > 0


@pytest.mark.parametrize("resident_share", [0.25, 0.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_more_steps_an_epoch_wait_for_the_device_no_more_often(optimizer, resident_share):
    def n_waits(n_images: int) -> int:
        changes = {
            "cache": FakeCache(n=n_images + 8),
            "resident_share": resident_share,
            "train_indices": np.arange(n_images),
            "held_out_indices": np.arange(n_images, n_images + 8),
            "train": TrainConfig(epochs=2, batch_size=4, optimizer=optimizer, loss="bce+dice"),
            "augment": AugmentConfig(hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
        }
        made = arguments(**changes)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(**made)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    n_waits(8)
    assert n_waits(64) == n_waits(8)


def test_out_of_memory_on_cuda_leaves_the_device_as_it_was():
    device = torch.device("cuda", 0)
    made = arguments(
        cache=FakeCache(n=40, size=(256, 256)),
        model_config=UNetConfig(base_channels=64, depth=4),
        train=TrainConfig(epochs=1, batch_size=32),
        train_indices=np.arange(32),
        held_out_indices=np.arange(32, 40),
        size=(256, 256),
    )
    devices.free_memory(device)
    before = torch.cuda.memory_allocated(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total, device)
    try:
        with pytest.raises(OutOfMemoryError, match="ran out of memory"):
            fit(**made)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.cuda.memory_allocated(device) == before
    small = dataclasses.replace(made["train"], batch_size=1)
    assert fit(**{**made, "train": small, "model_config": UNetConfig(base_channels=4, depth=2)}).rows


def test_a_compiled_fit_on_cuda_agrees_with_the_plain_one():
    if reason := devices.why_no_compile(torch.device("cuda")):
        pytest.skip(reason)
    plain = fit(**arguments(amp="off"))
    compiled = fit(**{**arguments(amp="off"), "runtime": make_runtime("cuda", amp="off", compile="on")})
    assert compiled.rows[-1].train.loss == pytest.approx(plain.rows[-1].train.loss, rel=0.02)
