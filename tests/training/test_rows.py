import dataclasses
import json

import pytest

from hpsearch.training.rows import EpochRow, Scores
from hpsearch.typed_json import from_json, to_json

ROW = EpochRow(
    epoch=2,
    time=1700000000.125,
    train=Scores(0.5, 0.8, 0.7, 0.9),
    held_out=Scores(0.6, 0.7, 0.6, 0.8),
    lr=0.01,
    train_s=1.5,
    eval_s=0.5,
    images_per_s=10.0,
    peak_bytes=1 << 40,
)


@pytest.mark.parametrize("row", [ROW, dataclasses.replace(ROW, held_out=None)])
def test_a_row_survives_json(row):
    assert from_json(EpochRow, json.loads(json.dumps(to_json(row)))) == row


@pytest.mark.parametrize("missing", ["epoch", "time", "train", "held_out", "lr"])
def test_a_row_without_a_field_is_none(missing):
    table = to_json(ROW)
    del table[missing]
    with pytest.raises((KeyError, TypeError)):
        from_json(EpochRow, table)
