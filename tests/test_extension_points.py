"""A file that is added to a folder of the package is found by its name, from the search to a loaded model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpsearch

NETWORK = '''
"""Two convolutions."""

from torch import nn


def build(config, in_channels):
    inner = nn.Conv2d(in_channels, config.base_channels, 3, padding=1)
    return nn.Sequential(inner, nn.ReLU(), nn.Conv2d(config.base_channels, 1, 1))
'''
LOSS = '''
"""Focal loss with an exponent of 2."""

from torch.nn.functional import binary_cross_entropy_with_logits


def loss(logits, masks, config):
    cross_entropy = binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return ((1 - (-cross_entropy).exp()) ** 2 * cross_entropy).mean()
'''
SETTINGS = (
    "data.size=32 data.n_search_train=8 data.n_search_validation=8 data.n_final_train=8 data.n_final_test=4 "
    'unet.network=two_layers search.unet.base_channels=[2,3] search.train.loss=["bce+dice","dice+focal"] '
    "train.epochs=1 train.batch_size=4 study.trials=2 study.folds=2 study.confirm=0"
)


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the package in a folder of its own, with one more network and one more loss."""
    site, root = tmp_path / "site", Path(hpsearch.__file__).parents[1]
    for name in ("hpsearch", "experiments"):
        shutil.copytree(root / name, site / name)
    (site / "hpsearch/models/networks/two_layers.py").write_text(NETWORK)
    (site / "hpsearch/training/losses/focal.py").write_text(LOSS)
    return site


def _python(site: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_STATE_HOME": str(folder / "state")}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_network_and_a_loss_of_one_file_each_are_searched_end_to_end(extended: Path, tmp_path: Path) -> None:
    where = ["--data", "sample", "--out", str(tmp_path), "--study", "s", "--tracking", "none", "--device", "cpu"]
    settings = [part for setting in SETTINGS.split() for part in ("--set", setting)]
    _python(extended, tmp_path, "-m", "hpsearch", "study", *where, *settings, "--workers", "1", "--threads", "1")

    trials = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("studies/s/trials/*/trial.json"))]
    assert [trial["outcome"] for trial in trials] == ["complete", "complete"]
    assert all(0 <= trial["value"] <= 1 for trial in trials)

    weights = str(next(tmp_path.glob("studies/s/trials/*/*/weights.safetensors")))
    load = "import sys; from hpsearch.training.checkpoint import load_weights as l; m, i = l(sys.argv[1]);"
    printed = _python(extended, tmp_path, "-c", load + "print(i.model.network, type(m).__name__, len(m))", weights)
    assert printed.split() == ["two_layers", "Sequential", "3"]
