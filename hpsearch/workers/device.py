"""Find the device of this machine. As a program (`python -m hpsearch.workers.device auto`), print it as JSON."""

import json
import socket
import sys
from typing import Any

import psutil
import torch

from hpsearch.training.runtime import describe, make_runtime


def find_device(name: str) -> dict[str, Any]:
    """Return the fields of `ClusterWorker` that describe the device with this name (see `choose_device`).

    The memory is that of the whole GPU or host. Raises DeviceError if the device is not available.
    """
    runtime, host = make_runtime(name), socket.gethostname()
    unit, memory_bytes = host, psutil.virtual_memory().total
    if runtime.device.type == "cuda":
        card = torch.cuda.get_device_properties(runtime.device)
        unit, memory_bytes = str(card.uuid), card.total_memory
    capacity = {"device": runtime.device.type, "precision": runtime.precision, "memory_bytes": memory_bytes}
    return {"host": host, "device_name": describe(runtime)["device_name"], "unit": unit, "capacity": capacity}


if __name__ == "__main__":
    print(json.dumps(find_device(sys.argv[1])))
