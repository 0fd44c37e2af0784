import dataclasses

import numpy as np
import pytest

from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.training.task import FitTask
from tests.training import fakes
from tests.training.fakes import fit_arguments

VALID = UNetConfig(base_channels=2, depth=1, stacking=1, padding="valid", norm="none")


def make_task(**changes) -> FitTask:
    arguments = {**fit_arguments(), **changes}
    return fakes.make_task(**{name: value for name, value in arguments.items() if name not in ("data", "runtime")})


def test_a_checkpoint_of_version_0_1_is_that_of_the_same_fit():
    assert make_task().digest("fake") == "14eca2a4b36c2f7b"
    windows = make_task(model_config=VALID, stretch=False, micro_batch=2)
    assert windows.digest("fake") == "aef26030d0c7aea8"


def test_a_new_setting_changes_the_digest_only_where_it_is_not_at_its_default():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(TrainConfig):
        warmup_epochs: int = 0

    task = make_task()
    settings = dataclasses.asdict(task.config.train)
    before = task.digest("fake")
    assert make_task(train=Later(**settings)).digest("fake") == before
    assert make_task(train=Later(**settings, warmup_epochs=3)).digest("fake") != before


def test_only_a_network_without_padding_has_a_margin_and_only_without_stretching():
    assert make_task(model_config=VALID).margin == 0
    assert make_task(model_config=VALID, stretch=False).margin == 4
    assert make_task(stretch=False).margin == 0


def test_a_network_that_cannot_be_trained_on_so_few_images_is_refused():
    deep = UNetConfig(base_channels=2, depth=4, stacking=1)
    assert make_task(model_config=deep).why_impossible() is None
    reason = make_task(model_config=deep, train_indices=np.arange(1)).why_impossible()
    assert reason is not None
    assert reason.startswith("with 1 image at once: encoder")


@pytest.mark.parametrize(("n_images", "expected"), [(40, 16), (16, 16), (5, 5)])
def test_a_batch_has_no_more_images_than_there_are_to_train_on(n_images, expected):
    task = make_task(train=TrainConfig(batch_size=16), train_indices=np.arange(n_images))
    assert task.images_per_step == expected
