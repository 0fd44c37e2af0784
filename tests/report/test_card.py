"""hpsearch/report/card.py: what a model is, scores and is not for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpsearch.report.page import model_card
from hpsearch.report.rows import study_rows
from hpsearch.stats.intervals import Interval
from tests.recorded import POOL_KEY, FakeStudy


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    study = FakeStudy(tmp_path_factory.mktemp("card"), overrides=('data.root="/some/where/skin|photos"',))
    study.trial(**{"train.lr": 0.002})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.final(1)
    study.final(0)
    return study


def card_of(study: FakeStudy, number: int) -> str:
    rows = study_rows(study.record)
    (final,) = [final for final in rows.finals if final.trial.number == number]
    return model_card(rows, final)


def test_the_card_says_what_the_model_is_and_what_it_was_trained_on(study: FakeStudy) -> None:
    card = card_of(study, 1)
    assert card.startswith("# fake, trial 1: ")
    assert "8 base channels, depth 4, 2 convolutions per stage" in card
    assert "RGB, 16x16 pixels (the whole image resized)" in card
    assert "learning rate 0.05" in card
    assert "all 20 images of the pool" in card
    assert POOL_KEY in card
    # The folder's name without what a table would break at, and not where it lies.
    assert "`skin/photos`" in card
    assert "/some/where" not in card


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.match=crop",), "(crops at the image's own resolution)"),
        (("augment.crop=true", "data.cache_size=24"), "(crops of the resized image)"),
    ],
)
def test_the_card_says_that_a_model_was_trained_on_crops(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    study = FakeStudy(tmp_path, overrides=overrides)
    study.trial()
    study.final(0)
    assert said in card_of(study, 0)


def test_scores_have_intervals_and_the_estimate_of_the_search(study: FakeStudy) -> None:
    rows = study_rows(study.record)
    (final,) = [final for final in rows.finals if final.trial.number == 1]
    assert rows.estimates is not None
    card = card_of(study, 1)
    test = final.test["dice"]
    assert f"{test.mean:.4f} [{test.low:.4f}, {test.high:.4f}]" in card
    assert "test, original resolution" not in card
    official = {"jaccard": Interval(0.71, 0.7, 0.72), "threshold_jaccard": Interval(0.61, 0.6, 0.62)}
    with_official = model_card(rows, dataclasses.replace(final, official=official))
    assert "| test, original resolution |" in with_official
    assert "| Threshold Jaccard (0.65) |  |  | 0.6100 [0.6000, 0.6200] |" in with_official
    corrected = rows.estimates.corrected
    assert f"The search estimated a Dice of {corrected.mean:.4f} [{corrected.low:.4f}" in card
    assert "The search estimated" not in card_of(study, 0)


def test_every_card_names_the_limits(study: FakeStudy) -> None:
    assert "**not a medical device**" in card_of(study, 0)
    rows = study_rows(study.record)
    assert "images are synthetic" not in model_card(rows, rows.finals[0])
    drawn = dataclasses.replace(study.config, data=dataclasses.replace(study.config.data, root="sample"))
    assert "images are synthetic" in model_card(dataclasses.replace(rows, config=drawn), rows.finals[0])
