"""What all tests share: one thread, quiet libraries, and property tests that do not depend on the clock."""

from __future__ import annotations

import os

# Read by the libraries when they are loaded. Two threads on a shared core make tiny networks many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import hypothesis

hypothesis.settings.register_profile(
    "hpsearch",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("hpsearch")
