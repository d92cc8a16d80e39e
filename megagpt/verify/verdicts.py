"""Comparison of ranks with one process: one verdict per quantity."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import torch

from megagpt.model import partition_of
from megagpt.plan import Plan, traffic_per_step
from megagpt.verify.measure import RankMeasurement, Reference

TRAFFIC_BOUND = 0.01
"""ZeRO pads what it cuts: a share of a tiny model's bytes."""


@dataclass(frozen=True)
class Verdict:
    """One quantity, how far it is off, and how far it may be."""

    quantity: str
    difference: float
    bound: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within its bound; no number never is."""
        return self.difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Bounds:
    """Largest differences that rounding explains."""

    loss: float
    """Absolute, in nats per token."""
    norm: float
    """Relative."""
    weights: float
    """2-norm of the difference of all weights, relative to that of what the updates changed."""


EXACT = Bounds(loss=1e-5, norm=1e-5, weights=1e-4)
# AdamW divides by the size of a gradient, so that rounding moves weights whose gradients nearly vanish.
FP32 = Bounds(loss=1e-5, norm=1e-5, weights=1e-2)


NOISE = 3.0
"""How many times as far as one process itself a layout may be off: it is another draw of the same rounding, and the few
runs of one process from which that is known are no more than that."""


def bounds_for(plan: Plan, reference: Reference) -> Bounds:
    """The bounds for a run's precision and optimizer: `NOISE` times what rounding does to one process.

    In fp32 not less than 1e-5, which is what adding up the same numbers in another order does to most models.
    """
    rounding = reference.rounding
    bounds = Bounds(NOISE * rounding.loss, NOISE * rounding.norm, NOISE * rounding.weights)
    if plan.precision != "fp32":
        return bounds
    least = EXACT if plan.run.optimizer.name == "sgd" else FP32
    return Bounds(*map(max, zip(astuple(least), astuple(bounds), strict=True)))


def judge(plan: Plan, ranks: Sequence[RankMeasurement], reference: Reference) -> list[Verdict]:
    """Hold every rank against the reference.

    Args:
        plan: what the ranks ran.
        ranks: by global rank.
        reference: what one process did.
    """
    bounds = bounds_for(plan, reference)
    losses = max(_largest(np.subtract(rank.losses, reference.losses)) for rank in ranks)
    relative = [np.subtract(rank.norms, reference.norms) / np.asarray(reference.norms) for rank in ranks]
    norms = max(_largest(difference) for difference in relative)
    steps = len(reference.losses)
    fall = reference.losses[0] - reference.losses[-1]
    shards = _assemble(ranks)
    return [
        Verdict("loss", losses, bounds.loss, f"{steps} steps; it falls by {fall:.2f}"),
        Verdict("gradient norm", norms, bounds.norm, f"{steps} steps, relative"),
        _weights(plan, shards, reference, bounds.weights),
        _copies(plan, ranks, shards),
        *_tied(plan, ranks, shards),
        *_traffic(plan, ranks),
    ]


Shards = dict[tuple[str, int, int], np.ndarray]
"""Flattened master weights by canonical name, pipeline stage and tensor-parallel rank; NaN where no rank owns them."""


def _largest(values: np.ndarray) -> float:
    """Largest absolute value; NaN if there is one."""
    return float(np.abs(values).max())


def _assemble(ranks: Sequence[RankMeasurement]) -> Shards:
    shards: Shards = {}
    for rank in ranks:
        for name, shape in rank.shapes.items():
            shards.setdefault((name, rank.stage, rank.tensor_rank), np.full(math.prod(shape), np.nan, np.float32))
        for part in rank.fragments:
            flat = shards[part.name, rank.stage, rank.tensor_rank]
            flat[part.start : part.start + len(part.values)] = part.values
    return shards


def _weights(plan: Plan, shards: Shards, reference: Reference, bound: float) -> Verdict:
    """Every full parameter against the reference's."""
    shapes = {name: value.shape for name, value in reference.weights.items()}
    missing = sorted(set(shapes) - {name for name, _, _ in shards})
    if missing:
        return Verdict("weights", math.nan, bound, f"no rank has {missing[0]}")
    squares, worst, worst_name = 0.0, -1.0, ""
    for name, expected in reference.weights.items():
        stage = min(stage for key, stage, _ in shards if key == name)
        parts = [shards[name, stage, tensor] for tensor in range(plan.tensor_parallel_size)]
        partition = partition_of(name, plan.model.is_gated)
        shape = list(expected.shape)
        if partition.vocabulary:
            shape[0] = plan.padded_vocab_size
        if partition.dim is not None:
            shape[partition.dim] //= plan.tensor_parallel_size
        tensors = [torch.from_numpy(part).reshape(shape) for part in parts]
        square = float(np.square(partition.join(tensors, plan.model.vocab_size).numpy() - expected).sum())
        squares += square
        if not square <= worst:
            worst, worst_name = square, name
    difference = math.sqrt(squares) / reference.distance
    return Verdict("weights", difference, bound, f"of {len(shapes)} parameters; most in {worst_name}")


def _copies(plan: Plan, ranks: Sequence[RankMeasurement], shards: Shards) -> Verdict:
    """What several ranks hold must be one: master weights over TP, weights of the forward pass over TP and DP."""
    largest, worst, count = 0.0, "", 0
    for (name, stage, tensor), flat in shards.items():
        if tensor > 0 and partition_of(name, plan.model.is_gated).dim is None:
            difference = _largest(flat - shards[name, stage, 0])
            count += 1
            if not difference <= largest:
                largest, worst = difference, name
    digests: dict[tuple[str, int, int], set[str]] = {}
    for rank in ranks:
        for name, digest in rank.digests.items():
            tensor = rank.tensor_rank if partition_of(name, plan.model.is_gated).dim is not None else 0
            digests.setdefault((name, rank.stage, tensor), set()).add(digest)
    for (name, _, _), found in digests.items():
        count += 1
        if len(found) > 1:
            largest, worst = max(largest, 1.0), name
    return Verdict("copies over ranks", largest, 0.0, f"{worst} differs" if worst else f"{count} compared, bit for bit")


def _tied(plan: Plan, ranks: Sequence[RankMeasurement], shards: Shards) -> list[Verdict]:
    """The first and the last stage's copy of a tied embedding.

    On CPUs torch's AdamW rounds the last elements of a tensor, which fill no vector register, unlike the others, and
    the stages' flat partitions end at other places.
    """
    last = plan.pipeline_parallel_size - 1
    if plan.model.untie_embeddings_and_output_weights or last == 0:
        return []
    name = "embedding.word_embeddings.weight"
    pairs = [(shards.get((name, 0, t)), shards.get((name, last, t))) for t in range(plan.tensor_parallel_size)]
    differences = [math.nan if a is None or b is None else _largest(a - b) for a, b in pairs]
    bound, how = 0.0, "bit for bit"
    if plan.run.optimizer.name == "adamw" and ranks[0].device == "cpu":
        largest = max((_largest(a) for a, _ in pairs if a is not None), default=0.0)
        bound, how = 4 * float(np.spacing(np.float32(largest))), "but for last bits at ends of partitions"
    return [Verdict("tied copies", float(np.max(differences)), bound, f"first and last stage, {how}")]


def _traffic(plan: Plan, ranks: Sequence[RankMeasurement]) -> list[Verdict]:
    """Bytes per step by group and collective against what the Plan foretells: the worst rank of each, or, where routers
    decide which rank gets how many tokens, the mean of the worst stage."""
    worst: dict[tuple[str, str], tuple[float, float, float]] = {}
    for stage, counted in _counted(plan, ranks):
        foretold: dict[tuple[str, str], float] = {}
        for transfer in traffic_per_step(plan, stage):
            if ranks[0].device == "cpu":
                transfer = transfer.without_cuda()
            key = transfer.group, transfer.collective
            foretold[key] = foretold.get(key, 0.0) + transfer.ring_bytes
        for key in {*foretold, *counted}:
            expected, found = foretold.get(key, 0.0), counted.get(key, 0.0)
            off = abs(found - expected) / expected if expected else math.inf
            if expected or found:
                worst[key] = max(worst.get(key, (-1.0, 0.0, 0.0)), (off, found, expected))
    return [
        Verdict(
            f"bytes: {group} {collective}",
            off,
            TRAFFIC_BOUND,
            f"{found / 1024:,.1f} KiB, foretold {expected / 1024:,.1f}",
        )
        for (group, collective), (off, found, expected) in sorted(worst.items())
    ]


def _counted(plan: Plan, ranks: Sequence[RankMeasurement]) -> Iterator[tuple[int, dict[tuple[str, str], float]]]:
    """Stage and bytes of what is compared: every rank, or the mean rank of each stage if there are experts."""
    if plan.model.num_experts is None:
        yield from ((rank.stage, rank.traffic) for rank in ranks)
        return
    for stage in range(plan.pipeline_parallel_size):
        members = [rank.traffic for rank in ranks if rank.stage == stage]
        keys = {key for traffic in members for key in traffic}
        yield stage, {key: sum(traffic.get(key, 0.0) for traffic in members) / len(members) for key in keys}
