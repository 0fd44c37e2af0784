from __future__ import annotations

import math

import pytest

from hpsearch import config as configs
from hpsearch.typed_json import from_json, to_json
from hpsearch.workers import plan as plans
from hpsearch.workers.local_pool import WorkerSettings
from hpsearch.workers.plan import ExecutionPlan, MeasuredStep


def make_plan(memory_bytes: int = 2**34, **changes: object) -> ExecutionPlan:
    base: dict[str, object] = {
        "device": "cpu",
        "precision": "float32",
        "workers": (WorkerSettings("cpu", 2),),
        "memory_bytes": memory_bytes,
        "steps": (MeasuredStep(10**8, 1e-3, 4e-4), MeasuredStep(10**9, 5e-3, 2e-3)),
    }
    return ExecutionPlan(**{**base, **changes})  # type: ignore[arg-type]


def config(*overrides: str) -> configs.StudyConfig:
    return configs.load(None, ["unet.base_channels=8", "data.size=64", "unet.depth=3", *overrides])


def test_a_plan_survives_the_study_folder() -> None:
    plan = make_plan(machine={"torch": "2.15"})
    assert from_json(ExecutionPlan, to_json(plan)) == plan


def test_seconds_between_measured_steps_grow_with_flops_and_fixed_costs_remain() -> None:
    plan = make_plan()
    epochs = [plan.epoch_s(config(f"unet.base_channels={base}"), 100, 0) for base in (1, 8, 16, 64)]
    assert epochs == sorted(epochs)
    assert epochs[0] == pytest.approx(0.1)
    assert epochs[-1] > 100 * 5e-3


def test_nothing_is_foreseen_where_nothing_was_measured() -> None:
    assert math.isnan(make_plan(steps=()).epoch_s(config(), 100, 20))


def test_a_configuration_that_vanishes_is_infeasible_whatever_the_memory() -> None:
    found = plans.why_infeasible(config("unet.padding=valid", "unet.depth=6"), make_plan(2**60))
    assert found is not None
    assert found.excess == 1.0


def test_the_constraint_grows_with_the_memory_that_is_lacking() -> None:
    needed = plans.predicted_bytes(config(), make_plan())
    assert plans.why_infeasible(config(), make_plan(2 * needed)) is None
    little = plans.why_infeasible(config(), make_plan(needed))
    less = plans.why_infeasible(config(), make_plan(needed // 4))
    assert little is not None
    assert less is not None
    assert 0 < little.excess < less.excess
    assert "GiB" in less.reason


def test_the_report_s_runs_fit_eight_gibibytes_as_it_found() -> None:
    report = ["data.size=572", "unet.base_channels=32", "unet.depth=4", "unet.padding=valid", "unet.norm=none"]
    card = make_plan(8 * 2**30)
    assert plans.why_infeasible(config(*report, "train.batch_size=16"), card) is None
    assert plans.why_infeasible(config(*report, "train.batch_size=64"), card) is not None


def test_a_sample_of_the_space_stays_inside_it() -> None:
    space = config(
        "search.train.lr={low=0.001, high=0.1, log=true}",
        "search.unet.stacking={low=1, high=3}",
        "search.train.batch_size={low=4, high=16, step=4}",
    )
    found = plans.sample_space(space, 200)
    assert {each.unet.stacking for each in found} == {1, 2, 3}
    assert {each.train.batch_size for each in found} == {4, 8, 12, 16}
    assert all(0.001 <= each.train.lr <= 0.1 for each in found)
    assert sum(each.train.lr < 0.01 for each in found) == pytest.approx(100, abs=30)


def test_the_default_the_cheapest_and_the_dearest_are_measured() -> None:
    space = config("search.unet.base_channels=[4, 8, 16]")
    assert [each.unet.base_channels for each in plans.measured_configs(space)] == [8, 4, 16]
    impossible = config("unet.padding=valid", "unet.depth=6", "search.unet.depth=[6, 7]")
    assert plans.measured_configs(impossible) == []
