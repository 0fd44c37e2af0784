import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from hpsearch.cores import available_cores
from hpsearch.errors import DeviceError
from hpsearch.training import runtime
from hpsearch.training.runtime import Runtime, choose_device, choose_precision, make_runtime

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are two GPUs of the given compute capability."""

    def pretend(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")

    return pretend


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_cuda_before_mps_before_the_cpu(gpus, no_gpu, monkeypatch):
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    gpus(9)
    assert choose_device("auto") == CUDA


def test_a_gpu_is_chosen_by_its_number(gpus):
    gpus(9)
    assert choose_device("cuda") == CUDA
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "no device cuda exists"),
        ("cuda:1", "no device cuda:1 exists"),
        ("mps", "no MPS device"),
        ("xla", "device xla needs torch_xla"),
        ("tpu", "unknown device 'tpu': it is auto, cpu, cuda, cuda:N, mps or xla"),
        ("cuda:x", "unknown device"),
        ("cuda:-1", "unknown device"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(name, message, no_gpu):
    with pytest.raises(DeviceError, match=message):
        choose_device(name)


def test_a_gpu_beyond_the_last_is_an_error_that_counts_them(gpus):
    gpus(9)
    with pytest.raises(DeviceError, match="finds 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.parametrize(("major", "expected"), [(6, "float32"), (7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_auto_precision_on_cuda_follows_the_card(major, expected, gpus):
    gpus(major)
    assert choose_precision(CUDA, "auto") == expected


@pytest.mark.parametrize("computes", [True, False])
def test_auto_precision_on_a_processor_is_bf16_only_where_it_computes_in_it(computes, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_computes_bf16", lambda: computes)
    assert choose_precision(CPU, "auto") == ("bf16" if computes else "float32")
    assert choose_precision(CPU, "bf16") == "bf16"
    assert choose_precision(CPU, "off") == "float32"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\nbugs :\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_the_processors_flags_tell_whether_it_computes_in_bf16(text, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    runtime.cpu_computes_bf16.cache_clear()
    assert runtime.cpu_computes_bf16() is expected
    runtime.cpu_computes_bf16.cache_clear()


def test_a_precision_that_a_device_lacks_is_refused(gpus):
    gpus(3)
    with pytest.raises(DeviceError, match=r"Tesla K80 does not support bf16: use train\.amp = 'fp16'"):
        choose_precision(CUDA, "bf16")
    assert choose_precision(CUDA, "fp16") == "fp16"
    with pytest.raises(DeviceError, match="fp16' is for CUDA devices, not cpu"):
        choose_precision(CPU, "fp16")


def test_other_devices_stay_in_float32_unless_told():
    assert choose_precision(torch.device("mps"), "auto") == "float32"
    assert choose_precision(torch.device("mps"), "bf16") == "bf16"


def test_threads_default_to_the_cores_there_are_and_must_be_positive():
    assert make_runtime("cpu").threads == available_cores() >= 1
    assert make_runtime("cpu", threads=3).threads == 3
    with pytest.raises(DeviceError, match="threads must be at least 1"):
        make_runtime("cpu", threads=0)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_autocast_computes_in_the_precision(precision, expected):
    chosen = Runtime(device=CPU, precision=precision, compile="off", threads=1)
    layer = torch.nn.Linear(2, 2)
    with chosen.autocast():
        assert layer(torch.zeros(1, 2)).dtype == expected


def test_only_fp16_scales_its_loss():
    chosen = Runtime(device=CPU, precision="bf16", compile="off", threads=1)
    assert not chosen.make_scaler().is_enabled()
    assert dataclasses.replace(chosen, precision="fp16").make_scaler().is_enabled()


def test_what_active_sets_it_restores_even_after_an_error():
    threads = torch.get_num_threads()
    chosen = Runtime(device=CPU, precision="float32", compile="off", threads=threads + 1)
    with chosen.active():
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError), chosen.active():
        torch.set_num_threads(1 // 0)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_way_of_running_out_of_memory_is_known(error, expected):
    assert runtime.is_out_of_memory(error) is expected


def test_torchs_own_failure_to_allocate_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert runtime.is_out_of_memory(error.value)


def test_peak_memory_sees_what_was_held_in_between():
    runtime.reset_peak_memory(CPU)
    before = runtime.peak_memory(CPU)
    held = np.ones(2**25, np.uint8)
    del held
    assert runtime.peak_memory(CPU) >= before + 2**24


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is reset on Linux")
def test_the_peak_of_one_fit_is_not_that_of_the_fit_before():
    held = np.ones(2**27, np.uint8)
    high = runtime.peak_memory(CPU)
    del held
    runtime.free_memory(CPU)
    runtime.reset_peak_memory(CPU)
    assert runtime.peak_memory(CPU) < high - 2**26


def test_the_description_names_the_processor_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert runtime.describe(make_runtime("cpu", amp="off", threads=1))["device_name"]


def test_peak_memory_is_known_where_it_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    runtime.reset_peak_memory(CPU)
    assert runtime.peak_memory(CPU) > 2**24


def test_the_description_names_machine_precision_and_versions():
    table = runtime.describe(make_runtime("cpu", amp="off", threads=2))
    assert table["device"] == "cpu"
    assert table["precision"] == "float32"
    assert table["threads"] == "2"
    assert table["torch"] == torch.__version__
    assert table["device_name"]
    assert all(isinstance(value, str) for value in table.values())


def test_compilation_needs_a_compiler_and_triton(monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert "C++ compiler" in (runtime.why_no_compile(CPU) or "")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/" + name)
    assert runtime.why_no_compile(CPU) is None
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert "triton" in (runtime.why_no_compile(CUDA) or "")
    assert "mps" in (runtime.why_no_compile(torch.device("mps")) or "")


def test_xla_runs_its_recorded_operations_at_the_end_of_each_step(monkeypatch):
    synced = []
    fake = types.SimpleNamespace(device=lambda: torch.device("xla", 0), sync=lambda **kwargs: synced.append(kwargs))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    chosen = make_runtime("xla", threads=1)
    assert (chosen.device.type, chosen.precision) == ("xla", "bf16")
    chosen.end_step()
    make_runtime("cpu", threads=1).end_step()
    assert synced == [{}]
