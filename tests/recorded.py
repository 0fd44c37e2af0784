"""Writes the record of a study that was never trained, and the cache that its figures are drawn from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.config import StudyConfig
from hpsearch.data.cache import INDEX, Index, Preparation
from hpsearch.data.dataset import Sample, Split
from hpsearch.data.decode_pool import ImageStats
from hpsearch.data.folds import Folds
from hpsearch.paths import FitPaths, ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Outcome, PruneDecision, ReplicateRecord, Shortlist, TrialRecord
from hpsearch.training.metrics import PixelCounts, dice
from hpsearch.training.rows import EpochRow, Scores
from hpsearch.typed_json import to_json

BEGAN_AT = 1_760_000_000.0
EPOCH_S = 2.0
POOL_KEY, TEST_KEY = "0" * 24, "1" * 24
SEARCH = (
    "search.unet.depth=[2, 3, 4]",
    "search.unet.base_channels=[4, 8, 16]",
    "search.train.lr={low=0.001, high=0.3, log=true}",
)
OUTCOMES: tuple[Outcome, ...] = ("complete", "complete", "pruned", "infeasible", "diverged", "failed")


class FakeStudy:
    """A study on disk whose trials are written down instead of trained, epoch by epoch if wanted."""

    def __init__(
        self,
        project: Path,
        name: str = "fake",
        *,
        n_images: int = 20,
        n_folds: int = 2,
        epochs: int = 3,
        size: int = 16,
        overrides: tuple[str, ...] = (),
    ) -> None:
        self.project = ProjectPaths(project)
        given = [
            f"data.size={size}",
            "unet.base_channels=8",
            "unet.depth=3",
            "train.lr=0.05",
            f"train.epochs={epochs}",
        ]
        given += [f"study.folds={n_folds}", "study.trials=6", "study.confirm=0", *SEARCH, *overrides]
        self.config: StudyConfig = configs.load(None, given)
        self.record = StudyRecord.create(self.project.study(name), self.config)
        ids = [f"ISIC_{i:07d}" for i in range(n_images)]
        splits: list[Split] = ["train"] * n_images
        folds = Folds(tuple(ids), tuple(i % n_folds for i in range(n_images)), n_folds, 0, "kfold")
        self.record.write_folds(folds, POOL_KEY)
        machine = {"device": "cpu", "device_name": "a processor", "precision": "float32", "threads": "1"}
        machine |= {"python": "3.11.9", "torch": "2.9.0", "numpy": "2.4.0", "platform": "an operating system"}
        plan = {"device": "cpu", "precision": "float32", "workers": [{"device": "cpu", "threads": 1}]}
        self.record.write_plan({**plan, "memory_bytes": 2**33, "steps": [], "machine": machine})
        self.machine = machine
        self.clock = BEGAN_AT
        write_cache(self.project.cache, POOL_KEY, ids, splits, size)

    @property
    def n_epochs(self) -> int:
        return self.config.train.epochs

    def begin(self, **params: Any) -> TrialRecord:
        """The next trial, without any epoch yet."""
        number = len(self.record.trial_numbers())
        rng = np.random.default_rng(number)
        drawn = {"unet.depth": int(rng.choice([2, 3, 4])), "unet.base_channels": int(rng.choice([4, 8, 16]))}
        drawn["train.lr"] = float(np.exp(rng.uniform(math.log(0.001), math.log(0.3))))
        params = {**({} if number == 0 else drawn), **params}
        trial = TrialRecord(
            number=number,
            params=params,
            config=self.config.with_params(params).to_dict(),
            began_at=self._tick(),
            source="default" if number == 0 else "sampler",
            code="0.1.0+0123456789abcdef",
        )
        self.record.write_evaluation(trial)
        return trial

    def epoch(self, trial: TrialRecord, fold: int) -> None:
        """One more epoch of a fold; after the last one the fit is finished."""
        fit = self.record.fit(trial.number, fold)
        epoch = len(fit.epochs()) + 1
        quality = trial_quality(trial)
        held_out = self.record.folds.held_out(fold)
        write_epoch(fit.paths, epoch, self._tick(), quality, fold, held_out, self.n_epochs)
        if epoch == self.n_epochs:
            finish_fit(fit.paths, quality, fold, held_out, self.config.data.height, self.machine)

    def fold(self, trial: TrialRecord, fold: int) -> None:
        """All that is left of a fold."""
        while not self.record.fit(trial.number, fold).is_finished:
            self.epoch(trial, fold)

    def end(self, trial: TrialRecord, outcome: Outcome = "complete") -> TrialRecord:
        """End a trial as it is; `full` needs all folds."""
        verdict = PruneDecision(drop=True, estimate=0.61, fold=0, epoch=1, reason="d 0.21 over trial 0", p=0.001)
        reasons = {"pruned": "d 0.21 over trial 0", "diverged": "the training loss became nan", "failed": "it died"}
        reasons["infeasible"] = "needs about 9.1 GiB for a training step, but this device has 8.0 GiB"
        values = {"complete": lambda: self.record.value(trial.number), "pruned": lambda: 0.61}
        ended = dataclasses.replace(
            trial,
            outcome=outcome,
            value=values[outcome]() if outcome in values else None,
            reason=reasons.get(outcome, ""),
            ended_at=self._tick(),
            decisions=(verdict,) if outcome == "pruned" else (),
            failures={"0": ["was killed by signal 9"] * 3} if outcome == "failed" else {},
        )
        self.record.write_evaluation(ended)
        return ended

    def trial(self, outcome: Outcome = "complete", **params: Any) -> TrialRecord:
        """A whole trial that ends so: dropped and diverged ones in their first fold."""
        trial = self.begin(**params)
        if outcome == "complete":
            for fold in range(self.record.n_folds):
                self.fold(trial, fold)
        elif outcome in ("pruned", "diverged"):
            self.epoch(trial, 0)
        return self.end(trial, outcome)

    def replicate(self, number: int, gain: float = -0.005) -> None:
        """The second fits of that trial, by so much better than the first."""
        trial = self.record.trial(number)
        began_at, quality = self._tick(), trial_quality(trial) + gain
        for fold in range(self.record.n_folds):
            fit, held_out = self.record.fit(number, fold, replicate=1).paths, self.record.folds.held_out(fold)
            for epoch in range(1, self.n_epochs + 1):
                write_epoch(fit, epoch, self._tick(), quality, fold, held_out, self.n_epochs)
            finish_fit(fit, quality, fold, held_out, self.config.data.height, self.machine)
        self.record.write_evaluation(
            ReplicateRecord(
                trial=number, began_at=began_at, outcome="complete", ended_at=self._tick(), code=trial.code
            )
        )

    def confirm(self, *numbers: int, gains: Mapping[int, float] = MappingProxyType({})) -> None:
        """Confirm the study with the second fits of these trials."""
        for number in numbers:
            self.replicate(number, gains.get(number, -0.005))
        full = tuple(trial.number for trial in self.record.contenders(self.record.trials()))
        self.record.write_shortlist(Shortlist(numbers, full, self.config.study.confirm))

    def final(self, number: int, n_test: int = 12, **more: Any) -> None:
        """A finished `final` of that trial, one seed; `more` goes into its result."""
        trial = self.record.trial(number)
        size, metric = self.config.data.height, self.config.study.metric
        ids = [f"ISIC_9{i:06d}" for i in range(n_test)]
        write_cache(self.project.cache, TEST_KEY, ids, ["test"] * n_test, size)
        folder = self.record.paths.final(f"trial-{number:04d}")
        fit, quality, images = folder.seed(0), trial_quality(trial), np.arange(n_test)
        began_at = self._tick()
        for epoch in range(1, self.n_epochs + 1):
            write_epoch(fit, epoch, self._tick(), quality, 0, np.arange(0), self.n_epochs)
        finish_fit(fit, quality, 0, images, size, self.machine)
        fit.counts.rename(fit.test_counts)
        interval = {"mean": quality, "low": quality - 0.01, "high": quality + 0.01}
        names = ("dice", "jaccard", "accuracy", "sensitivity", "specificity")
        paths.write_text(folder.config, trial.study_config.to_toml())
        for figure in (folder.curves, folder.panels):
            paths.write_text(figure, "a figure")
        paths.write_text(folder.table, "image,dice\n" + "".join(f"{id},{quality:.6f}\n" for id in ids))
        result = {
            "format": 1,
            "study": self.record.name,
            "trial": number,
            "params": trial.params,
            "metric": metric,
            "n_pool": len(self.record.folds.ids),
            "n_test": n_test,
            "cv": interval,
            "cv_fold_std": 0.01,
            "test": dict.fromkeys(names, interval),
            "per_seed": {name: [quality] for name in names},
            "against_default": None,
            "began_at": began_at,
            "ended_at": self._tick(),
            "test_key": TEST_KEY,
            **more,
            "n_seeds": 1,
            "runtime": self.machine,
        }
        paths.write_json(folder.result, result)

    def _tick(self) -> float:
        self.clock = round(self.clock + EPOCH_S, 3)
        return self.clock


def trial_quality(trial: TrialRecord) -> float:
    """What the trial is worth: best at a learning rate of 0.05, better with depth and width."""
    config = trial.study_config
    off = abs(math.log10(config.train.lr) - math.log10(0.05))
    return 0.86 - 0.06 * off**2 - 0.02 * (4 - config.unet.depth) - 0.01 * math.log2(16 / config.unet.base_channels)


def write_epoch(
    fit: FitPaths,
    epoch: int,
    time: float,
    quality: float,
    fold: int,
    held_out: npt.NDArray[np.int64],
    n_epochs: int,
) -> None:
    """One more line in epochs.jsonl and one more row in scores.npy."""
    rng = np.random.default_rng([fold, epoch, int(quality * 1e6)])
    progress = 1 - 0.6 * math.exp(-4 * epoch / n_epochs)
    ahead = 0.05 * epoch / n_epochs
    values = [(quality + ahead) * progress, quality * progress + rng.normal(0, 0.004)]
    train, tested = (Scores(1.1 - v, v, v / (2 - v), 0.6 + 0.4 * v) for v in values)
    row = EpochRow(
        epoch=epoch,
        time=time,
        train=train,
        held_out=tested if len(held_out) else None,
        lr=0.05,
        train_s=1.5,
        eval_s=0.25,
        images_per_s=800.0 + fold,
        peak_bytes=600 * 2**20,
    )
    fit.root.mkdir(parents=True, exist_ok=True)
    with fit.epochs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_json(row)) + "\n")
    if len(held_out):
        before = np.load(fit.scores) if fit.scores.is_file() else np.zeros((0, len(held_out)), np.float32)
        scores = image_scores(quality, fold, len(held_out), 32) * progress
        np.save(fit.scores, np.concatenate([before, scores[None].astype(np.float32)]))


def image_counts(quality: float, fold: int, n: int, size: int) -> npt.NDArray[np.int64]:
    """tp, fp, fn, tn of n images, (n, 4): mean Dice about `quality`, a tail of bad ones."""
    rng = np.random.default_rng([fold, n])
    n_mask = rng.integers(size * size // 8, size * size // 3, n)
    found = np.clip(rng.beta(12 * quality, 12 * (1 - quality), n), 0.02, 1)
    tp = (found * n_mask).astype(np.int64)
    fp = ((1 - found) * n_mask).astype(np.int64)
    return np.stack([tp, fp, n_mask - tp, size * size - n_mask - fp], axis=1)


def image_scores(quality: float, fold: int, n: int, size: int) -> npt.NDArray[np.float64]:
    return np.asarray(dice(PixelCounts.from_columns(image_counts(quality, fold, n, size))))


def finish_fit(
    fit: FitPaths,
    quality: float,
    fold: int,
    images: npt.NDArray[np.int64],
    size: int,
    machine: dict[str, Any],
) -> None:
    """What stays of a finished fit. The last row of scores.npy becomes the Dice of counts.npy."""
    counts = image_counts(quality, fold, len(images), size)
    last = np.asarray(dice(PixelCounts.from_columns(counts)), np.float32)
    if fit.scores.is_file():
        scores = np.load(fit.scores)
        scores[-1] = last
        np.save(fit.scores, scores)
    np.save(fit.counts, counts)
    chosen = np.argsort(last, kind="stable")[np.linspace(0, len(last) - 1, min(6, len(last))).round().astype(int)]
    moved = [np.roll(_blob(size, int(images[i])), int(size * (1 - last[i]) / 2), axis=1) for i in chosen]
    probabilities = np.stack(moved).astype(np.uint8) * 255
    np.savez_compressed(fit.examples, indices=images[chosen], scores=last[chosen], probabilities=probabilities)
    rows = [json.loads(line) for line in fit.epochs.read_text().splitlines()]
    summary = {"format": 1, "epochs": len(rows), "value": float(last.mean()), "n_held_out": len(images)}
    paths.write_json(fit.fit, {**summary, "runtime": machine})


def write_cache(root: Path, key: str, ids: list[str], splits: list[Split], size: int) -> None:
    """A memory-mapped cache of dark blobs on skin."""
    preparation = Preparation(height=size, width=size, views=("resize",))
    samples = tuple(
        Sample(id=id, image=Path(f"{id}.jpg"), mask=Path(f"{id}.png"), split=split)
        for id, split in zip(ids, splits, strict=True)
    )
    stats = ImageStats(size, size, "0" * 64, "0" * 64, size, (0,) * 9, 0, size)
    folder = root / f"{key}-memmap"
    folder.mkdir(parents=True, exist_ok=True)
    index = Index(key, "memmap", preparation, samples, (stats,) * len(ids), ())
    masks = np.stack([_blob(size, number) for number in range(len(ids))])
    skin = np.array([214, 165, 140]) + np.random.default_rng(0).normal(0, 6, (len(ids), size, size, 3))
    images = np.where(masks[..., None] > 0, skin * 0.5, skin).clip(0, 255).astype(np.uint8)
    (images_path, _), (masks_path, _) = index.files(folder)
    np.save(images_path, images)
    np.save(masks_path, masks)
    index.write(folder / INDEX)


def _blob(size: int, seed: int) -> npt.NDArray[np.uint8]:
    """A wobbly disc of ones, (size, size)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    rows, columns = rows + rng.uniform(-0.1, 0.1), columns + rng.uniform(-0.1, 0.1)
    angle = np.arctan2(rows, columns)
    radius = rng.uniform(0.2, 0.3) * (1 + 0.2 * np.sin(3 * angle + rng.uniform(0, 6)))
    return (np.hypot(rows, columns) < radius).astype(np.uint8)
