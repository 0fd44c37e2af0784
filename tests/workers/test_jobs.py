from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from hpsearch import config as configs
from hpsearch.data.dataset import Sample
from hpsearch.data.reading import Reading
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing
from hpsearch.training.rows import EpochRow, Scores
from hpsearch.workers.jobs import (
    CachePaths,
    CountJob,
    EpochEnded,
    Failed,
    Finished,
    FitJob,
    Job,
    KeepJob,
    MeasuredStep,
    MeasureJob,
    Measurement,
    OfficialScoreJob,
    Ready,
    Report,
    SelectPostprocessingJob,
    StepToMeasure,
    Stopped,
    from_message,
    to_message,
)

CONFIG = configs.load(None, ["data.size=[32, 48]"]).with_params({})
CACHES = CachePaths(Path("/cache/a"), Path("/cache/b"))
FILE = Path("/out/file")
STEP = StepToMeasure(CONFIG, CachePaths(Path("/cache/a")))
FIT = FitJob(
    trial=3, fold=1, config=CONFIG, folder=FILE, caches=CACHES, train=(0, 2), held_out=(1,), seed=7, replicate=1
)
EVERY_JOB: tuple[Job, ...] = (
    FIT,
    OfficialScoreJob(
        weights=(FILE, FILE),
        reading=Reading(lesion=("1",)),
        images=(Sample("x", FILE, FILE, "test"),),
        masks=None,
        counts=FILE,
    ),
    SelectPostprocessingJob(
        config=CONFIG,
        caches=CACHES,
        networks=(FoldNetwork(FILE, None, (1, 2)), FoldNetwork(FILE, FILE, (0,))),
        source="refits of trial 3",
        ensemble=True,
        out=FILE,
    ),
    KeepJob(copies=((FILE, FILE),), postprocessing=Postprocessing(threshold=0.4, clean=True)),
    CountJob(config=CONFIG, caches=CACHES, weights=(FILE,), postprocessing=Postprocessing(), counts=FILE),
    CountJob(
        config=CONFIG, caches=CACHES, weights=(FILE,), postprocessing=Postprocessing(), counts=FILE, examples=FILE
    ),
    MeasureJob(config=CONFIG, threads=2, steps=(STEP,)),
)
ROW = EpochRow(
    epoch=1,
    time=1.0,
    train=Scores(0.5, 0.6, 0.7, 0.8),
    held_out=None,
    lr=0.1,
    train_s=1.0,
    eval_s=0.5,
    images_per_s=10.0,
    peak_bytes=1,
)
MEASUREMENT = Measurement("cuda", 2, "bf16", 10**9, (MeasuredStep(10, 0.1, 0.05),), {"torch": "2"})
EVERY_REPORT: tuple[Report, ...] = (
    Ready(),
    EpochEnded(ROW),
    Finished(0.8),
    Finished(measurement=MEASUREMENT),
    Finished(),
    Stopped(),
    Failed(error="StorageError", text="disk full"),
)


def test_every_kind_of_job_is_tried_here() -> None:
    assert {type(job) for job in EVERY_JOB} == set(typing.get_args(Job))


@pytest.mark.parametrize("message", [*EVERY_JOB, *EVERY_REPORT], ids=lambda each: type(each).__name__)
def test_a_job_or_report_survives_the_way_between_coordinator_and_worker(message: Job | Report) -> None:
    assert from_message(json.loads(json.dumps(to_message(message)))) == message


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "trial 2, fold 2"),
        ({"replicate": 1}, "the refit of trial 2, fold 2"),
        ({"held_out": ()}, "the final fit of trial 2"),
    ],
)
def test_the_name_of_a_fit_says_what_it_is_part_of(changes: dict[str, typing.Any], name: str) -> None:
    fit = dataclasses.replace(FIT, trial=2, fold=1, held_out=(3,), replicate=0)
    assert dataclasses.replace(fit, **changes).name == name
