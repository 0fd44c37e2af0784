import math

import pytest
import torch

from hpsearch.config.train import TrainConfig
from hpsearch.training.loop import lr_factor, make_optimizer

CPU = torch.device("cpu")


def test_cosine_starts_at_one_passes_a_half_midway_and_would_end_at_zero():
    config = TrainConfig(schedule="cosine")
    assert [lr_factor(config, step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    factors = [lr_factor(config, step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)


def test_cosine_agrees_with_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for step in range(17):
        assert 0.3 * lr_factor(TrainConfig(), step, 17) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_constant_is_one():
    assert {lr_factor(TrainConfig(schedule="constant"), step, 10) for step in range(10)} == {1.0}


def test_a_fit_of_one_step_trains_at_the_full_rate():
    assert lr_factor(TrainConfig(), 0, 1) == 1


def test_sgd_follows_its_definition():
    config = TrainConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer(config, [parameter], CPU)
    value, velocity = 2.0, None
    for step in range(3):
        lr = 0.1 * (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor([0.5])
        optimizer.step()
        gradient = 0.5 + 0.01 * value
        velocity = gradient if velocity is None else 0.9 * velocity + gradient
        value -= lr * velocity
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-6)


def test_adamw_follows_its_definition():
    config = TrainConfig(optimizer="adamw", lr=0.1, weight_decay=0.05)
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer(config, [parameter], CPU)
    value, m, v = 2.0, 0.0, 0.0
    for step in range(1, 4):
        gradient = 0.5 / step
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        value *= 1 - 0.1 * 0.05
        value -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers_are_fused_where_torch_has_it(optimizer):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    made = make_optimizer(TrainConfig(optimizer=optimizer), parameters, CPU)
    assert made.param_groups[0]["fused"]
