"""The learning-rate schedule and which parameters decay."""

import pytest
import torch
from tiny import ADAM, SGD, tiny_plan
from torch import nn

from megagpt.optim import build_optimizer, learning_rate


def rates(steps: int, **optimizer) -> list[float]:
    plan = tiny_plan(optimizer=dict(name="adamw", **optimizer), steps=steps)
    return [learning_rate(step, plan) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    found = rates(10, lr=1.0, min_lr=0.0, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0, "the decay begins at the peak"


def test_cosine_passes_the_middle_and_reaches_the_minimum():
    plan = tiny_plan(optimizer=dict(name="adamw", lr=1.0, min_lr=0.2, warmup_steps=2, decay_steps=10), steps=20)
    assert learning_rate(6, plan) == pytest.approx(0.6), "half way between peak and minimum"
    assert learning_rate(4, plan) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)  # a quarter: cos 45 degrees
    assert learning_rate(10, plan) == pytest.approx(0.2)
    assert [learning_rate(step, plan) for step in (11, 19, 10_000)] == pytest.approx([0.2] * 3)
    assert rates(20, lr=1.0, min_lr=0.0)[1:] == sorted(rates(20, lr=1.0, min_lr=0.0)[1:], reverse=True)


def test_a_constant_rate():
    assert rates(5, lr=0.5, min_lr=0.5) == [0.5] * 5


def parameters() -> list[tuple[str, nn.Parameter]]:
    shapes = {"head.weight": (4, 3), "layers.0.mlp.linear_fc1.bias": (4,), "final_norm.weight": (3,)}
    return [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def test_only_matrices_decay():
    named = parameters()
    optimizer = build_optimizer(named, tiny_plan(optimizer=dict(ADAM, weight_decay=0.1, lr=0.5)))
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    values = {name: parameter.detach() for name, parameter in named}
    assert torch.equal(values.pop("head.weight"), torch.full((4, 3), 1 - 0.5 * 0.1))
    for value in values.values():
        assert torch.equal(value, torch.ones_like(value))


def test_the_first_step_of_adam_and_of_sgd():
    for options, expected in ((dict(ADAM, weight_decay=0.0, lr=0.25), 0.75), (dict(SGD, lr=0.25, min_lr=0.0), 0.5)):
        named = parameters()
        optimizer = build_optimizer(named, tiny_plan(optimizer=options))
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        for _, parameter in named:  # Adam's first step is lr x sign(gradient), SGD's lr x gradient
            assert torch.allclose(parameter, torch.full_like(parameter, expected))


def test_coefficients_arrive():
    options = dict(name="adamw", lr=0.1, min_lr=0.0, beta1=0.7, beta2=0.8, eps=1e-6)
    group = build_optimizer(parameters(), tiny_plan(optimizer=options)).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.7, 0.8), 1e-6)
