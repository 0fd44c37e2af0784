import numpy as np
import pytest
import torch

from hpsearch.config.train import TrainConfig
from hpsearch.training.losses import loss_function


def numpy_loss(logits: np.ndarray, masks: np.ndarray, terms: list[str], smooth: float) -> float:
    """The definition, image by image and pixel by pixel."""
    losses = []
    for image_logits, image_mask in zip(logits, masks, strict=True):
        bce = both = pred = mask = 0.0
        for z, y in zip(image_logits.ravel(), image_mask.ravel(), strict=True):
            p = 1 / (1 + np.exp(-z))
            bce -= y * np.log(p) + (1 - y) * np.log(1 - p)
            both, pred, mask = both + p * y, pred + p, mask + y
        parts = {
            "bce": bce / image_mask.size,
            "dice": 1 - (2 * both + smooth) / (pred + mask + smooth),
            "jaccard": 1 - (both + smooth) / (pred + mask - both + smooth),
        }
        losses.append(sum(parts[term] for term in terms))
    return float(np.mean(losses))


@pytest.fixture
def logits_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 1, 5, 6, generator=generator)
    masks = (torch.rand(4, 1, 5, 6, generator=generator) > 0.5).to(torch.uint8)
    masks[3] = 0
    return logits, masks


@pytest.mark.parametrize("smooth", [1.0, 0.25])
@pytest.mark.parametrize("loss", ["bce", "dice", "jaccard", "bce+dice", "bce+jaccard", "bce+dice+jaccard"])
def test_losses_agree_with_a_numpy_loop(loss, smooth, logits_and_masks):
    logits, masks = logits_and_masks
    value = loss_function(TrainConfig(loss=loss, smooth=smooth))(logits, masks)
    expected = numpy_loss(logits.double().numpy(), masks.numpy(), loss.split("+"), smooth)
    assert value.shape == ()
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["bce", "dice", "jaccard"])
def test_gradients_agree_with_finite_differences(loss, logits_and_masks):
    logits, masks = logits_and_masks
    logits.requires_grad_()
    loss_function(TrainConfig(loss=loss))(logits, masks).backward()
    gradient = logits.grad
    assert gradient is not None
    points = logits.detach().double().numpy()
    for index in [(0, 0, 0, 0), (2, 0, 3, 1), (3, 0, 4, 5)]:
        step = np.zeros_like(points)
        step[index] = 1e-5
        ahead = numpy_loss(points + step, masks.numpy(), [loss], 1.0)
        behind = numpy_loss(points - step, masks.numpy(), [loss], 1.0)
        assert float(gradient[index]) == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("loss", ["bce", "dice", "jaccard", "bce+dice"])
def test_a_batch_costs_the_weighted_mean_of_its_parts(loss, logits_and_masks):
    logits, masks = logits_and_masks
    compute = loss_function(TrainConfig(loss=loss))
    parts = 0.75 * compute(logits[:3], masks[:3]) + 0.25 * compute(logits[3:], masks[3:])
    torch.testing.assert_close(compute(logits, masks), parts)


@pytest.mark.parametrize("loss", ["dice", "jaccard"])
def test_a_perfect_prediction_costs_nothing_and_its_opposite_nearly_all(loss):
    masks = torch.zeros(1, 1, 20, 20, dtype=torch.uint8)
    masks[..., :10] = 1
    logits = torch.where(masks > 0, 50.0, -50.0)
    compute = loss_function(TrainConfig(loss=loss))
    assert float(compute(logits, masks)) == pytest.approx(0, abs=1e-6)
    assert float(compute(-logits, masks)) > 0.99


@pytest.mark.parametrize("loss", ["dice", "jaccard"])
def test_an_empty_mask_without_smoothing_costs_one_even_where_probabilities_underflow(loss):
    logits = torch.full((2, 1, 4, 4), -200.0, requires_grad=True)
    value = loss_function(TrainConfig(loss=loss, smooth=0.0))(logits, torch.zeros(2, 1, 4, 4))
    value.backward()
    assert float(value.detach()) == 1
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


@pytest.mark.parametrize("loss", ["bce", "dice", "jaccard"])
def test_losses_are_computed_in_float32_under_autocast(loss):
    logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks = (logits > 0.3).to(torch.uint8)
    compute = loss_function(TrainConfig(loss=loss))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compute(logits, masks)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, compute(logits.float(), masks), rtol=0, atol=0)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[[500.0, -500.0]]]], requires_grad=True)
    masks = torch.tensor([[[[0, 1]]]], dtype=torch.uint8)
    value = loss_function(TrainConfig(loss="bce+dice+jaccard"))(logits, masks)
    value.backward()
    assert float(value.detach()) > 400
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
