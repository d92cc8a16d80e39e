"""What a run does, as seen by its ranks, and what the same run does in one process with a plain torch loop."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megagpt.data.loader import MicroBatch, train_batches
from megagpt.data.samples import SampleStream
from megagpt.engine import build_engine
from megagpt.engine.engine import named_parameters
from megagpt.model import GPT, initialize_weights, partition_of, set_auxiliary_loss_scale
from megagpt.optim import build_optimizer
from megagpt.parallel.accounting import count_traffic
from megagpt.parallel.launch import detect_launch
from megagpt.parallel.ranks import Ranks, release_groups, start_ranks, start_single_process
from megagpt.plan import Plan


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter's fp32 master copy."""

    name: str
    start: int
    """Offset in the rank's flattened tensor-parallel shard."""
    values: np.ndarray


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank saw."""

    stage: int
    tensor_rank: int
    losses: list[float]
    """Mean loss per token before each update."""
    norms: list[float]
    """Norm of the gradient of each update, before clipping."""
    fragments: list[Fragment]
    """Master weights after the last update that live on this rank."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of this rank's tensor-parallel shard of each parameter."""
    digests: dict[str, str]
    """SHA-256 of the weights of the forward pass; none where ZeRO 3 cuts them."""
    traffic: dict[tuple[str, str], float]
    """Bytes sent in the last step by (group, collective), scalars left out."""


@dataclass(frozen=True)
class Reference:
    """What one process did."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    """Parameters after the last update by canonical name, vocabulary not padded."""
    distance: float
    """2-norm of what all updates together changed."""


class _Progressions:
    """A text of arithmetic progressions, some hundred tokens each, as a source of samples: learnable at once."""

    prefix = "synthetic"
    length = 320

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1."""
        positions = np.arange(start, stop)
        piece = positions // self.length
        return (piece * 7919 + positions * (1 + piece % 4)) % self.vocab_size


def sample_stream(plan: Plan) -> SampleStream:
    """The samples that are trained on."""
    samples = plan.global_batch_size * plan.run.training.steps
    source = _Progressions(plan.model.vocab_size)
    return SampleStream(source, (0, samples * plan.seq_length + 1), plan.seq_length, plan.run.training.seed)


def measure_runs(plans: list[Plan]) -> list[RankMeasurement]:
    """Run plans of one world size one after the other on this rank of a job. Collective."""
    measurements = []
    for plan in plans:
        ranks = start_ranks(plan, detect_launch())
        measurements.append(measure_run(plan, ranks))
        release_groups()
    return measurements


def measure_run(plan: Plan, ranks: Ranks) -> RankMeasurement:
    """Train and note what happens. Collective."""
    engine = build_engine(plan, ranks)
    batches = _batches(plan, ranks.data_rank, ranks.data_size)
    losses, norms = [], []
    with count_traffic(ranks) as traffic:
        for _ in range(plan.run.training.steps):
            traffic.calls.clear()
            result = engine.train_step(batches, plan.run.optimizer.lr)
            losses.append(float(result.loss))
            assert result.grad_norm is not None, "ZeRO always reports it"
            norms.append(float(result.grad_norm))
    return RankMeasurement(
        stage=ranks.pipeline_rank,
        tensor_rank=ranks.tensor_rank,
        losses=losses,
        norms=norms,
        fragments=[
            Fragment(part.name, part.start, part.master.float().cpu().numpy().copy()) for part in engine.fragments()
        ],
        shapes={name: engine.shard_shape(name) for name in engine.parameters},
        digests={
            name: hashlib.sha256(parameter.detach().float().cpu().numpy().tobytes()).hexdigest()
            for name, parameter in engine.parameters.items()
            if not hasattr(parameter, "ds_id")
        },
        traffic={key: sent for key, (_, sent) in traffic.without_scalars().totals().items() if sent > 0},
    )


def measure_references(plans: list[Plan]) -> list[Reference]:
    """The same models, samples and optimizers in this one process, without DeepSpeed.

    Args:
        plans: for one rank and in fp32.
    """
    start_single_process()
    return [_reference(plan) for plan in plans]


def _reference(plan: Plan) -> Reference:
    model = GPT(plan)
    initialize_weights(named_parameters(model, plan), plan, 0)
    optimizer = build_optimizer(named_parameters(model, plan), plan)
    first = _weights(model, plan)
    batches = _batches(plan, 0, 1)
    for group in optimizer.param_groups:
        group["lr"] = plan.run.optimizer.lr
    set_auxiliary_loss_scale(1 / plan.num_microbatches, torch.device("cpu"))
    limit = plan.gradient_clipping or float("inf")
    losses, norms = [], []
    for _ in range(plan.run.training.steps):
        total = 0.0
        for _ in range(plan.num_microbatches):
            loss = model(*next(batches)) / plan.num_microbatches
            loss.backward()
            total += float(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    last = _weights(model, plan)
    distance = float(np.sqrt(sum(np.square(last[name] - first[name]).sum() for name in last)))
    return Reference(losses, norms, last, distance)


def _batches(plan: Plan, data_rank: int, data_size: int) -> Iterator[MicroBatch]:
    """One data-parallel rank's micro-batches, from the first sample on."""
    return train_batches(
        sample_stream(plan),
        first_sample=0,
        global_batch_size=plan.global_batch_size,
        microbatch_size=plan.microbatch_size,
        data_parallel_rank=data_rank,
        data_parallel_size=data_size,
    )


def _weights(model: GPT, plan: Plan) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in named_parameters(model, plan):
        full = partition_of(name, plan.model.is_gated).join([parameter.detach()], plan.model.vocab_size)
        found[name] = full.numpy().copy()
    return found
