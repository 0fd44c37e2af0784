import dataclasses
import functools

import numpy as np
import pytest
import torch

from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.errors import DeviceError
from hpsearch.training import loop
from hpsearch.training import runtime as devices
from hpsearch.training.progress import Progress
from tests.training.fakes import FLOAT32, fit, fit_arguments, make_task


@pytest.fixture(scope="module")
def plain() -> Progress:
    return fit(**fit_arguments())


def assert_equal(result: Progress, expected: Progress) -> None:
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor)
    assert result.scores.tobytes() == expected.scores.tobytes()


def test_without_a_compiler_auto_goes_on_and_on_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(devices, "why_no_compile", lambda device: "no compiler here")
    fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="auto")))
    with pytest.raises(DeviceError, match="no compiler here"):
        fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="on")))


def test_the_network_is_compiled_once_for_the_whole_fit(plain, monkeypatch):
    monkeypatch.setattr(devices, "why_no_compile", lambda device: None)
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: calls.append(model) or (lambda images: model(images)))
    assert_equal(fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="on"))), plain)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiler_that_fails_costs_auto_nothing_and_ends_on(plain, monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(loop, "_is_compiled", lambda *_: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    with pytest.raises(RuntimeError, match=r"C\+\+ compile error"):
        fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="on")))
    torch.compiler.reset()
    assert_equal(fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="auto"))), plain)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device", "size", "expected"), [("cpu", 572, False), ("cuda", 572, True), ("cuda", 64, False)]
)
def test_auto_compiles_long_fits_on_cuda_only(device, size, expected, monkeypatch):
    monkeypatch.setattr(devices, "why_no_compile", lambda device: None)
    arguments = fit_arguments(
        model_config=UNetConfig(base_channels=64),
        train=TrainConfig(epochs=100, batch_size=16),
        train_indices=np.arange(2000),
        size=(size, size),
    )
    del arguments["data"], arguments["runtime"]
    runtime = dataclasses.replace(FLOAT32, device=torch.device(device), compile="auto")
    assert loop._is_compiled(make_task(**arguments), runtime) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_fit_agrees_with_the_plain_one(plain):
    if reason := devices.why_no_compile(torch.device("cpu")):
        pytest.skip(reason)
    result = fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, compile="on")))
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, plain.model.state_dict()[name], rtol=1e-3, atol=1e-4)
