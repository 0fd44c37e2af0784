"""A network that predicts one class only is named, with the likely causes, wherever the study is looked at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hpsearch.cli import group
from hpsearch.report.page import write_report
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.constant_predictions import constant_prediction
from tests.data.conftest import Pair, tiny_pairs, write_pairs
from tests.recorded import FakeStudy
from tests.search.studies import run, tiny_config


def set_counts(study: FakeStudy, trial: int, fold: int, *counts: int) -> None:
    """Let every held-out image of a finished fit have these tp, fp, fn, tn."""
    fit = study.record.fit(trial, fold)
    np.save(fit.paths.counts, np.tile(np.array(counts, np.int64), (len(fit.counts()), 1)))


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ((0, 0, 5, 95), "no lesion"),
        ((5, 95, 0, 0), "nothing but lesion"),
        ((0, 1, 5, 94), ""),
        ((5, 94, 0, 1), ""),
        # What the masks say.
        ((0, 0, 0, 100), ""),
        ((100, 0, 0, 0), ""),
    ],
)
def test_one_class_everywhere_is_constant_unless_the_masks_are(
    tmp_path: Path, counts: tuple[int, ...], kind: str
) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    set_counts(study, 0, 1, *counts)
    assert constant_prediction(study.record.fit(0, 0)) == ""
    assert constant_prediction(study.record.fit(0, 1)) == kind


def test_status_and_report_name_the_trials_and_the_likely_causes(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for _ in range(3):
        study.trial()
    for fold in (0, 1):
        set_counts(study, 1, fold, 0, 0, 5, 95)
    set_counts(study, 2, 0, 5, 95, 0, 0)
    shown = CliRunner().invoke(group, ["status", "--out", str(tmp_path)]).output
    page = write_report(study.record).read_text(encoding="utf-8")
    for text in (shown, page):
        assert "trial 1 (2 of 2 folds): the network predicts no lesion on all held-out images. Likely causes" in text
        assert "trial 2 (1 of 2 folds): the network predicts nothing but lesion on all held-out images." in text
        assert "the normalisation (unet.norm, unet.input_norm)" in text
        assert "masks that are empty or wrong" in text


class _Said(NullCallback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def hidden_lesion(pair: Pair) -> Pair:
    image, mask = np.full_like(pair.image, 180), np.zeros_like(pair.mask)
    mask[10:14, 10:14] = 255
    return dataclasses.replace(pair, image=image, mask=mask)


@pytest.mark.usefixtures("in_process")
def test_a_study_whose_network_finds_nothing_says_so(tmp_path: Path) -> None:
    # Lesions of a few pixels without any contrast: the best guess is that there are none.
    root = tmp_path / "ISIC-2017"
    write_pairs(root, "archive", [hidden_lesion(pair) for pair in tiny_pairs()])
    heard = _Said()
    run(tmp_path, tiny_config(root, "study.trials=1", "train.loss=bce", "train.epochs=3"), callback=heard)
    (line,) = [text for text in heard.texts if text.startswith("warning: ")]
    assert line.startswith(
        "warning: trial 0 (1 of 2 folds): the network predicts no lesion on all held-out images. Likely causes"
    )
