"""Training for the sake of its curve: under DeepSpeed, and in a plain torch loop as the reference."""

import torch
from tiny import GLOBAL_BATCH, MICRO_BATCH, micro_batch, rank_batches

Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def train_plainly(plan):
    """The curve of a plain torch loop around the same model, and the model; needs a process of its own."""
    from megagpt.engine.weights import named_parameters
    from megagpt.model import GPT, initialize_weights, set_auxiliary_loss_scale
    from megagpt.optim import build_optimizer

    model = GPT(plan)
    initialize_weights(named_parameters(model, plan), plan, 0)
    optimizer = build_optimizer(named_parameters(model, plan), plan)
    set_auxiliary_loss_scale(MICRO_BATCH / GLOBAL_BATCH, torch.device("cpu"))
    curve: Curve = []
    for step in range(plan.run.training.steps):
        total = 0.0
        for first in range(0, GLOBAL_BATCH, MICRO_BATCH):
            loss = model(*micro_batch(step, first, plan.model.vocab_size)) * MICRO_BATCH / GLOBAL_BATCH
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total, norm.item()))
    return curve, model


def train_under_deepspeed(plan):
    """The curve of the engine on this rank, and the engine."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    curve: Curve = []
    for step in range(plan.run.training.steps):
        result = engine.train_step(rank_batches(plan, ranks.data_rank, step), plan.run.optimizer.lr)
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve, engine
