from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hpsearch.errors import WorkerError
from hpsearch.typed_json import from_json
from hpsearch.workers import dask_task, device
from hpsearch.workers.jobs import ClusterWorker

DASK_WORKER: Any = SimpleNamespace(state=SimpleNamespace(nthreads=3))


def test_the_cpu_of_this_machine_is_described_by_a_subprocess() -> None:
    found = asyncio.run(dask_task.find_device("cpu", DASK_WORKER))
    worker = from_json(ClusterWorker, {"address": "tcp://10.0.0.1:40123", **found})
    assert (worker.host, worker.unit, worker.threads) == (socket.gethostname(), socket.gethostname(), 3)
    assert (worker.capacity.device, worker.capacity.memory_bytes) == ("cpu", psutil.virtual_memory().total)
    assert worker.name == f"{socket.gethostname()}:40123"
    assert "torch" not in json.loads(
        _python("import json, sys, hpsearch.workers.dask_task; print(json.dumps([*sys.modules]))")
    )


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerError, match=r"^unknown device 'tpu': it is auto, cpu, cuda"):
        asyncio.run(dask_task.find_device("tpu", DASK_WORKER))


def test_a_gpu_is_identified_by_itself_and_not_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(uuid="GPU-1", total_memory=2**34, name="NVIDIA L4")
    runtime = SimpleNamespace(device=SimpleNamespace(type="cuda"), precision="bf16")
    monkeypatch.setattr(device, "make_runtime", lambda name: runtime)
    monkeypatch.setattr(device, "describe", lambda runtime: {"device_name": card.name})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    found = device.find_device("cuda")
    assert (found["unit"], found["device_name"]) == ("GPU-1", "NVIDIA L4")
    assert found["capacity"] == {"device": "cuda", "precision": "bf16", "memory_bytes": 2**34}


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
