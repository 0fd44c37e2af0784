import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_f1_score,
    binary_jaccard_index,
    binary_recall,
    binary_specificity,
)

from hpsearch.training import metrics
from hpsearch.training.metrics import PixelCounts, count_pixels


@pytest.fixture
def preds_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    preds = torch.rand(6, 1, 9, 7, generator=generator) > 0.4
    masks = torch.rand(6, 1, 9, 7, generator=generator) > 0.6
    masks[4], preds[4] = False, False
    masks[5], preds[5] = True, True
    return preds, masks.to(torch.uint8)


def test_counts_of_a_hand_worked_image():
    preds = np.array([[[1, 1, 0], [1, 0, 0]]], bool)
    masks = np.array([[[1, 0, 0], [1, 1, 0]]], np.uint8)
    assert [int(count[0]) for count in count_pixels(preds, masks)] == [2, 1, 1, 2]


def test_counts_are_int64_of_each_image_in_torch_and_numpy_alike(preds_and_masks):
    preds, masks = preds_and_masks
    ours, theirs = count_pixels(preds, masks), count_pixels(preds.numpy(), masks.numpy())
    for tensor, array in zip(ours, theirs, strict=True):
        assert tensor.dtype == torch.int64
        assert array.dtype == np.int64
        assert tensor.shape == (6,)
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_counts_stay_exact_where_fp16_and_bf16_overflow():
    preds = torch.ones(1, 1, 300, 300, dtype=torch.float16)
    assert int(count_pixels(preds, torch.ones(1, 1, 300, 300, dtype=torch.uint8)).tp[0]) == 90_000
    assert int(count_pixels(preds.bfloat16(), torch.ones(1, 1, 300, 300)).tp[0]) == 90_000


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dice", binary_f1_score),
        ("jaccard", binary_jaccard_index),
        ("accuracy", binary_accuracy),
        ("sensitivity", binary_recall),
        ("specificity", binary_specificity),
    ],
)
def test_scores_agree_with_torchmetrics(name, reference, preds_and_masks):
    preds, masks = preds_and_masks
    scores = metrics.SCORES[name](count_pixels(preds, masks))
    for i in range(4):
        expected = reference(preds[i].int(), masks[i])
        assert float(scores[i]) == pytest.approx(float(expected), abs=1e-6)


def test_scores_of_tensors_and_arrays_agree(preds_and_masks):
    preds, masks = preds_and_masks
    for score in metrics.SCORES.values():
        tensor, array = score(count_pixels(preds, masks)), score(count_pixels(preds.numpy(), masks.numpy()))
        assert array.dtype == np.float64
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-6)


def test_every_score_is_one_when_mask_and_prediction_are_both_empty():
    counts = count_pixels(np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4), np.uint8))
    assert {name: float(score(counts)[0]) for name, score in metrics.SCORES.items()} == dict.fromkeys(
        metrics.SCORES, 1
    )


def test_dice_and_jaccard_are_zero_when_only_the_mask_is_empty():
    counts = count_pixels(np.ones((1, 4, 4), bool), np.zeros((1, 4, 4), np.uint8))
    assert metrics.dice(counts)[0] == metrics.jaccard(counts)[0] == metrics.specificity(counts)[0] == 0
    assert metrics.sensitivity(counts)[0] == 1


def test_specificity_is_one_when_the_mask_is_full():
    counts = count_pixels(np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), np.uint8))
    assert metrics.specificity(counts)[0] == 1
    assert metrics.sensitivity(counts)[0] == metrics.dice(counts)[0] == 0


counts_strategy = st.lists(
    st.tuples(*[st.integers(0, 2**40)] * 4).filter(lambda counts: sum(counts) > 0), min_size=1, max_size=5
)


@given(counts_strategy)
@settings(max_examples=100, deadline=None)
def test_dice_is_two_jaccard_over_one_plus_jaccard_and_all_scores_lie_in_0_to_1(table):
    counts = PixelCounts.from_columns(np.array(table))
    j = metrics.jaccard(counts)
    np.testing.assert_allclose(metrics.dice(counts), 2 * j / (1 + j), rtol=1e-12)
    for score in metrics.SCORES.values():
        assert ((score(counts) >= 0) & (score(counts) <= 1)).all()


def test_columns_are_tp_fp_fn_tn():
    counts = PixelCounts.from_columns(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert [list(column) for column in counts] == [[1, 5], [2, 6], [3, 7], [4, 8]]


def test_counting_and_scoring_arrays_needs_no_torch():
    program = """
import sys
import numpy as np
from hpsearch.training import metrics, rows
metrics.dice(metrics.count_pixels(np.ones((1, 2, 2)), np.ones((1, 2, 2))))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
