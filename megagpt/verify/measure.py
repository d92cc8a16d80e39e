"""What a run does, as seen by its ranks, and what the same run does in one process with a plain torch loop."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.data.document_samples import DocumentStream
from megagpt.data.loader import NOT_LEARNT, Marks, MicroBatch, train_batches
from megagpt.data.marking import Marking, Spans
from megagpt.data.mixture import Samples
from megagpt.data.samples import SampleStream
from megagpt.engine import build_engine
from megagpt.engine.batches import PreparedBatch, prepare
from megagpt.engine.weights import named_parameters
from megagpt.model import GPT, initialize_weights, partition_of, set_auxiliary_loss_scale
from megagpt.optim import build_optimizer
from megagpt.parallel.accounting import count_traffic
from megagpt.parallel.launch import detect_launch
from megagpt.parallel.ranks import Ranks, release_groups, start_ranks, start_single_process
from megagpt.plan import Plan
from megagpt.verify.shrink import single_plan


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
    device: str = "cpu"
    """Type of the device that computed."""


@dataclass(frozen=True)
class Difference:
    """How far a run is from another one."""

    loss: float
    """Largest difference of a step's loss, in nats per token."""
    norm: float
    """Largest relative difference of a step's gradient norm."""
    weights: float
    """2-norm of the difference of all weights after the last update, relative to that of what the updates changed."""


NO_DIFFERENCE = Difference(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Reference:
    """What one process did."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    """Parameters after the last update by canonical name, vocabulary not padded."""
    distance: float
    """2-norm of what all updates together changed."""
    rounding: Difference = NO_DIFFERENCE
    """How far one process itself is off, at most: in fp32 its distance from fp64, in 16 bits that from fp32."""


class _Progressions:
    """A text of arithmetic progressions as a source of samples: learnable at once.

    Of a large vocabulary it uses some hundred tokens, spread over all of it.

    Args:
        vocab_size: of the model.
        lengths: tokens of the progressions, one after the other and again from the first; each is a document.
        marks: ids that begin, in every document, a span of unequal length, end it, and end the document; None: nothing
            does.
    """

    prefix = "synthetic"

    def __init__(self, vocab_size: int, lengths: Sequence[int] = (320,), marks: tuple[int, int, int] | None = None):
        self.spacing = max(vocab_size // 300, 1)
        self.num_tokens = vocab_size // self.spacing
        self._marks = marks
        self._lengths = np.asarray(lengths)
        self._ends = np.cumsum(lengths)

    def document_start(self, index: int) -> int:
        """First token of a progression."""
        round_, place = divmod(index, len(self._ends))
        return int(round_ * self._ends[-1] + (self._ends[place - 1] if place else 0))

    def document_lengths(self, first: int, behind: int) -> np.ndarray:
        """Tokens of progressions first to behind - 1."""
        return np.diff([self.document_start(index) for index in range(first, behind + 1)])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1."""
        positions = np.arange(start, stop)
        rounds, places = np.divmod(positions, self._ends[-1])
        row = np.searchsorted(self._ends, places, side="right")
        piece = rounds * len(self._ends) + row
        tokens = (piece * 7919 + positions * (1 + piece % 4)) % self.num_tokens * self.spacing
        if self._marks is not None:
            length, left = self._lengths[row], self._ends[row] - places
            for mark, before_end in zip(self._marks, (length - piece % 2, length // (2 + piece % 3), 1), strict=True):
                tokens[left == before_end] = mark
        return tokens


def sample_stream(plan: Plan) -> Samples:
    """The samples that are trained on; with sample options, of documents that are longer and shorter than a sample."""
    samples, data = plan.global_batch_size * plan.run.training.steps, plan.run.data
    length, seed, vocab_size = plan.seq_length, plan.run.training.seed, plan.model.vocab_size
    if not data.marks_documents and not data.masks_loss:
        return SampleStream(_Progressions(vocab_size), (0, samples * length + 1), length, seed)
    lengths = [max(length * share // 16, 2) for share in (5, 21, 3, 9, 1, 40, 7, 13, 2)]
    start, end, eod_id = marks = (vocab_size - 3, vocab_size - 2, vocab_size - 1)
    source = _Progressions(vocab_size, lengths, marks)
    spans = None if data.loss_spans is None else Spans((start,), (end,))
    if data.packing != "stream":
        marking = Marking(None, False, spans)
        return DocumentStream(source, (0, 4 * samples), length, seed, cut=data.packing == "cut", marking=marking)
    marking = Marking(eod_id, data.eod_mask_loss, spans)
    return SampleStream(source, (0, samples * length + 1), length, seed, marking=marking)


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
    batches = _batches(plan, ranks)
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
            Fragment(part.name, part.start, part.master.float().cpu().numpy().copy())
            for group in engine.groups_in_memory()
            for part in group
        ],
        shapes={name: engine.shard_shape(name) for name in engine.parameters},
        digests={
            name: hashlib.sha256(parameter.detach().float().cpu().numpy().tobytes()).hexdigest()
            for name, parameter in engine.parameters.items()
            if not hasattr(parameter, "ds_id")
        },
        traffic={key: sent for key, (_, sent) in traffic.without_scalars().totals().items() if sent > 0},
        device=ranks.device.type,
    )


def measure_references(plans: list[Plan]) -> list[Reference]:
    """The same models, samples and optimizers in this one process, in fp32 and without DeepSpeed.

    Args:
        plans: any layouts.
    """
    start_single_process()
    return [_measure_reference(plan) for plan in plans]


def _measure_reference(plan: Plan) -> Reference:
    single = single_plan(plan)
    reference = _run(single, torch.float32)
    exact = _run_in_fp64(single) if plan.precision == "fp32" else reference
    # Samples are cut into micro-batches in other ways: the same mathematics, rounded otherwise. The load-balancing loss
    # is taken per micro-batch, and would be another one: there the weights start a fraction of a bit apart.
    size, has_experts = plan.microbatch_size, plan.model.num_experts is not None
    ways = [(size, 0), (size, 1), (size, 2)] if has_experts else [(size, 0), (1, 0), (plan.global_batch_size, 0)]
    others = [
        reference
        if plan.precision == "fp32" and way == ways[0]
        else _run(single_plan(plan, plan.precision, way[0]), _DTYPES[plan.precision], way[1])
        for way in dict.fromkeys(ways)
    ]
    rounding = [_difference(other, exact) for other in others]
    return dataclasses.replace(reference, rounding=Difference(*map(max, zip(*map(astuple, rounding), strict=True))))


def _difference(one: Reference, other: Reference) -> Difference:
    """How far `one` is from `other`."""
    squares = sum(np.square(one.weights[name] - other.weights[name]).sum() for name in other.weights)
    return Difference(
        loss=float(np.abs(np.subtract(one.losses, other.losses)).max()),
        norm=float(np.abs(np.subtract(one.norms, other.norms) / np.asarray(other.norms)).max()),
        weights=math.sqrt(squares) / other.distance,
    )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _run_in_fp64(plan: Plan) -> Reference:
    to_fp32 = torch.Tensor.float
    torch.Tensor.float = lambda tensor, **_: tensor  # type: ignore[method-assign]  # how norms, scores and routers ask
    try:
        return _run(plan, torch.float64)
    finally:
        torch.Tensor.float = to_fp32  # type: ignore[method-assign]


def _run(plan: Plan, dtype: torch.dtype, nudge: int = 0) -> Reference:
    """Train in a plain torch loop; in 16 bits with fp32 master weights and sums of gradients, as the engines do.

    Args:
        plan: for one rank.
        dtype: of the weights in the forward and backward passes.
        nudge: seed of a change of the first weights, by at most an eighth of what rounding to `dtype` changes; 0: none.
    """
    model = GPT(plan)
    initialize_weights(named_parameters(model, plan), plan, 0)
    if nudge:
        _nudge(model, torch.finfo(dtype).eps / 16, nudge)
    model.to(dtype)
    parameters = list(model.parameters())
    masters = parameters if dtype.itemsize > 2 else [nn.Parameter(parameter.float()) for parameter in parameters]
    names = [name for name, _ in named_parameters(model, plan)]
    optimizer = build_optimizer(zip(names, masters, strict=True), plan)
    first = _weights(names, masters, plan)
    batches = _batches(plan)
    for group in optimizer.param_groups:
        group["lr"] = plan.run.optimizer.lr
    loss_scale = plan.deepspeed.initial_loss_scale if plan.precision == "fp16" else 1.0
    set_auxiliary_loss_scale(loss_scale / plan.num_microbatches, torch.device("cpu"))
    losses, norms = [], []
    for _ in range(plan.run.training.steps):
        total = 0.0
        for _ in range(plan.num_microbatches):
            loss = _loss(model, plan, prepare(next(batches), plan.run.data, torch.device("cpu")))
            (loss * loss_scale / plan.num_microbatches).backward()
            total += float(loss) / plan.num_microbatches
            if masters is not parameters:
                _add_gradients(parameters, masters, loss_scale)
        norms.append(_clip(masters, plan.gradient_clipping))
        optimizer.step()
        optimizer.zero_grad()
        if masters is not parameters:
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master)
        losses.append(total)
    last = _weights(names, masters, plan)
    distance = float(np.sqrt(sum(np.square(last[name] - first[name]).sum() for name in last)))
    return Reference(losses, norms, last, distance)


def _nudge(model: GPT, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data *= 1 + share * (2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1)


def _loss(model: GPT, plan: Plan, batch: PreparedBatch) -> Tensor:
    if next(model.parameters()).dtype != torch.float64:
        return model(*batch)
    logits_SBV = model(batch.tokens_BS, documents=batch.documents)[..., : plan.model.vocab_size]
    # The loss itself is always fp32.
    total = F.cross_entropy(
        logits_SBV.flatten(0, 1), batch.labels_BS.t().flatten(), ignore_index=NOT_LEARNT, reduction="sum"
    )
    return total / (batch.labels_BS.numel() if batch.loss_tokens is None else batch.loss_tokens)


def _clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale gradients down to the limit, if there is one; returns their norm before.

    Summed in fp64: torch's own norm is 1e-4 off for some million numbers in fp32 on a CPU.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    factor = limit / (norm + 1e-6)  # as torch and DeepSpeed have it
    if limit and factor < 1:
        for grad in grads:
            grad.mul_(factor)
    return norm


def _add_gradients(parameters: list[nn.Parameter], masters: list[nn.Parameter], loss_scale: float) -> None:
    """Add the 16-bit gradients of a micro-batch to the fp32 sums."""
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter.grad is None:  # an expert without tokens
            continue
        grad = parameter.grad.float() / loss_scale
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        parameter.grad = None


def _batches(plan: Plan, ranks: Ranks | None = None) -> Iterator[MicroBatch]:
    """A data-parallel rank's micro-batches, from the first sample on, read by each rank itself; None: of one rank."""

    data_rank, data_size = (0, 1) if ranks is None else (ranks.data_rank, ranks.data_size)
    marks = Marks(
        plan.run.data.marks_documents, plan.run.data.masks_loss, int if ranks is None else ranks.sum_over_replicas
    )
    return train_batches(
        sample_stream(plan),
        first_sample=0,
        global_batch_size=plan.global_batch_size,
        microbatch_size=plan.microbatch_size,
        data_parallel_rank=data_rank,
        data_parallel_size=data_size,
        marks=marks,
    )


def _weights(names: list[str], parameters: list[nn.Parameter], plan: Plan) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in zip(names, parameters, strict=True):
        full = partition_of(name, plan.model.is_gated).join([parameter.detach()], plan.model.vocab_size)
        found[name] = full.numpy().copy()
    return found
