"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megagpt.plan import Plan

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Per-parameter state tensors of each optimizer, by torch's names."""


def learning_rate(step: int, plan: Plan) -> float:
    """Learning rate of the update that takes the run from `step` to `step` + 1.

    Linear warm-up, then cosine decay to min_lr (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    optimizer = plan.run.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    assert optimizer.decay_steps is not None
    progress = min((step - optimizer.warmup_steps) / max(optimizer.decay_steps - optimizer.warmup_steps, 1), 1.0)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], plan: Plan) -> torch.optim.Optimizer:
    """torch's optimizer over two groups: matrices with weight decay; norms and biases without.

    Parameters that expert-parallel ranks do not share have a group of their own, as DeepSpeed wants it.

    Args:
        named: canonical name and parameter.
        plan: gives kind and coefficients.
    """
    options = plan.run.optimizer
    members: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for _, parameter in named:
        expert_group = "" if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor in place of the weight
        members.setdefault((len(shape) == 1, expert_group), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for is_exempt, expert_group in sorted(members):
        group = {"params": members[is_exempt, expert_group], "weight_decay": 0.0 if is_exempt else options.weight_decay}
        groups.append(group | ({"moe": True, "name": expert_group} if expert_group else {}))
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)
