"""Device, precision, threads, seeds and memory of a fit."""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import platform
import random
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from hpsearch.cores import available_cores
from hpsearch.errors import DeviceError

Precision = Literal["float32", "bf16", "fp16"]
CompileChoice = Literal["auto", "on", "off"]

_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, precision, compilation and threads of a fit. Each field may change floating-point results.

    The execution plan of a study stores the device, the precision and the number of threads.
    """

    device: torch.device
    precision: Precision
    """Precision of autocast; weights, losses and optimizer state stay in float32."""
    compile: CompileChoice
    """Whether to use torch.compile. With `auto`, only long fits use it."""
    threads: int
    """Number of CPU threads per operation."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context for forward passes."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def make_scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler. It is enabled only for fp16, where gradients would underflow without it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set torch's process-wide options (threads, TF32, cuDNN benchmark) for the block, then restore them.

        On devices other than CUDA this also calls `keep_freed_memory`, whose effect lasts until the process ends.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            if self.device.type == "cuda":
                # Make this device current, because pinned memory would otherwise take 0.5 GB on the first GPU.
                stack.enter_context(torch.cuda.device(self.device))
                # By default torch uses TF32 for float32 convolutions, but not for matrix products.
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                torch.backends.cudnn.benchmark = True
            else:
                keep_freed_memory()
            yield

    def end_step(self) -> None:
        """Run the operations that XLA has recorded since the last call. Has no effect on other devices."""
        if self.device.type == "xla":
            _torch_xla().sync()


def make_runtime(
    device: str = "auto", *, amp: str = "auto", compile: CompileChoice = "auto", threads: int | None = None
) -> Runtime:
    """Return the runtime for a device name and settings; `threads` defaults to the number of available cores.

    Raises DeviceError if the device or the precision is not available.
    """
    if threads is not None and threads < 1:
        raise DeviceError(f"threads must be at least 1, got {threads}")
    chosen, threads = choose_device(device), threads or available_cores()
    return Runtime(device=chosen, precision=choose_precision(chosen, amp), compile=compile, threads=threads)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `cpu`, `cuda`, `cuda:1`, `mps`, `xla` or `auto` (the first of CUDA, MPS, CPU).

    Raises DeviceError with the reason if the device is not available.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_gpus else "mps" if has_mps else "cpu"
    if name == "mps" and not has_mps:
        raise DeviceError("there is no MPS device: it needs macOS 14 on an Apple chip; use --device auto")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if name == "xla":
        return cast("torch.device", _torch_xla().device())
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"unknown device {name!r}: it is auto, cpu, cuda, cuda:N, mps or xla")
    if (index := int(match[1] or 0)) < n_gpus:
        return torch.device("cuda", index)
    raise DeviceError(f"no device {name} exists: torch {torch.__version__} finds {n_gpus} GPUs; use --device auto")


def choose_precision(device: torch.device, amp: str = "auto") -> Precision:
    """Return the precision of autocast on `device` for a value of `train.amp`.

    `auto` is bf16 where the hardware supports it (CUDA from Ampere on, CPUs with AVX512-BF16, AMX or Arm's BF16,
    TPUs), fp16 on Volta and Turing, and float32 elsewhere, because emulated bf16 is slower than float32. Raises
    DeviceError if the device does not support the precision.
    """
    kind = device.type
    major = torch.cuda.get_device_capability(device)[0] if kind == "cuda" else 0
    if amp == "auto":
        if major == 7:
            return "fp16"
        return "bf16" if major >= 8 or kind == "xla" or (kind == "cpu" and cpu_computes_bf16()) else "float32"
    if amp == "bf16" and kind == "cuda" and major < 8:
        raise DeviceError(f"{torch.cuda.get_device_name(device)} does not support bf16: use train.amp = 'fp16'")
    if amp == "fp16" and kind != "cuda":
        raise DeviceError(f"train.amp = 'fp16' is for CUDA devices, not {kind}: use 'auto'")
    found: dict[str, Precision] = {"off": "float32", "bf16": "bf16", "fp16": "fp16"}
    return found[amp]


@functools.cache
def cpu_computes_bf16() -> bool:
    """Return whether this CPU has bf16 instructions. False on macOS, where torch has no kernels for them."""
    # The checks in torch are private and differ between versions, and one of them also accepts emulation.
    flags = _cpu_info("flags|Features").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def describe(runtime: Runtime) -> dict[str, str]:
    """Return a description of the device, the processor and the versions, to be stored with the results."""
    device = runtime.device
    description = {
        "device": str(device),
        "device_name": _cpu_info("model name") or platform.processor() or platform.machine(),
        "precision": runtime.precision,
        "threads": str(runtime.threads),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["device_name"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        description["cuda"] = str(torch.version.cuda)
        description["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    elif device.type == "xla":
        description["device_name"] = str(_torch_xla().device())
        description["torch_xla"] = str(_torch_xla().__version__)
    return description


def _cpu_info(key: str) -> str:
    """Return the first value in Linux's /proc/cpuinfo whose name matches the pattern `key`, or an empty string."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^(?:{key})\s*:(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` returns, if the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # On Linux, writing 5 resets the peak of resident memory. On other systems, and in containers that mask the file,
    # the peak remains that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, in bytes.

    On CUDA it is the memory allocated by torch, elsewhere the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> None:
    """Release all unreferenced memory, including reference cycles. Takes a few tenths of a second."""
    gc.collect()
    trim_memory(device)


def trim_memory(device: torch.device) -> None:
    """Release the unused memory that the allocator of `device` keeps for reuse."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system. Has no effect with other C libraries.

    Without this call, each step of the UNet at 128x128 had 30000 page faults, which took a tenth of its time.
    `trim_memory` still returns all freed memory to the system.
    """
    if (libc := _glibc()) is not None:
        # Constants of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
        for option, n_bytes in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)):
            libc.mallopt(option, n_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, NumPy or Python raised `error` because memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator and MPS raise a plain RuntimeError, and so do cuDNN and cuBLAS if a workspace does not fit.
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def why_no_compile(device: torch.device) -> str | None:
    """Return the reason why torch.compile cannot work on `device`, or None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not used on {device.type}"
    variable, *compilers = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "cc")
    if not any(map(shutil.which, [os.environ.get(variable, ""), *compilers])):
        return "torch.compile needs a C++ compiler (g++ or clang++), and none is installed"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the package triton, which is not installed"
    return None


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _torch_xla() -> Any:
    try:
        import torch_xla
    except ImportError as error:
        raise DeviceError("device xla needs torch_xla (extra `xla`) and torch of the same version") from error
    return torch_xla
