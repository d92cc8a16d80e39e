"""What ranks say to each other: calls and bytes of every collective, by process group.

Megatron-Core, DeepSpeed and torch call collectives in many ways (`torch.distributed`, functions that they kept at
import, `deepspeed.comm`), but all of them end in a method of torch's ProcessGroup. That is the one place where this
module counts, so that nothing is missed and nothing is counted twice.

Bytes are counted by the convention of `plan/traffic.py`, "ring bytes", so that both can be compared.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.ranks import Ranks
from megagpt.plan import RING_FACTORS


@dataclass(frozen=True)
class Call:
    """One collective as one rank issued it."""

    collective: str
    """all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, reduce, gather, scatter, send, recv, barrier."""
    group: str
    """Name of the process group: see `group_names`."""
    size: int
    """Ranks of the group."""
    payload: int
    """Bytes of the whole tensor: the output of an all-gather, the input of a reduce-scatter, ..."""
    dtype: torch.dtype | None
    """Type of the elements; None for a barrier."""
    in_backward: bool
    """Whether autograd's backward pass issued it."""

    @property
    def ring_bytes(self) -> float:
        """Bytes that this rank sends."""
        return RING_FACTORS[self.collective](self.size) * self.payload


@dataclass
class Traffic:
    """All calls of one rank, in order."""

    calls: list[Call] = field(default_factory=list)

    def select(self, **wanted: Any) -> "Traffic":
        """The calls whose fields have these values, such as `group="data", collective="all_reduce"`."""
        return Traffic([call for call in self.calls if all(getattr(call, key) == wanted[key] for key in wanted)])

    def without_scalars(self, at_most: int = 16) -> "Traffic":
        """The calls that move more than a few numbers: gradient norm, overflow flag and loss left out.

        Args:
            at_most: bytes of what counts as a scalar.
        """
        return Traffic([call for call in self.calls if call.payload > at_most])

    @property
    def payload(self) -> int:
        """Bytes of all tensors, each whole."""
        return sum(call.payload for call in self.calls)

    @property
    def ring_bytes(self) -> float:
        """Bytes sent by this rank."""
        return sum(call.ring_bytes for call in self.calls)

    def totals(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Number of calls and ring bytes by (group, collective), groups of one rank left out."""
        sums: dict[tuple[str, str], tuple[int, float]] = {}
        for call in self.calls:
            if call.size > 1:
                calls, sent = sums.get((call.group, call.collective), (0, 0.0))
                sums[call.group, call.collective] = (calls + 1, sent + call.ring_bytes)
        return dict(sorted(sums.items()))


@contextlib.contextmanager
def count_traffic(ranks: Ranks) -> Iterator[Traffic]:
    """Count every collective that this process issues while the block runs, in all of its threads.

    Args:
        ranks: gives the groups their names.
    """
    traffic = Traffic()
    names = group_names(ranks)
    # From the class's dictionary: looked up as attributes they would lose their binding to the group.
    originals = {method: vars(dist.ProcessGroup)[method] for method in _METHODS if method in vars(dist.ProcessGroup)}
    try:
        for method in originals:
            setattr(dist.ProcessGroup, method, _counted(method, names, traffic))
        yield traffic
    finally:
        for method, original in originals.items():
            setattr(dist.ProcessGroup, method, original)


def group_names(ranks: Ranks) -> dict[frozenset[int], str]:
    """Names of the process groups that this rank is in, by their members: DeepSpeed makes groups of its own.

    Where two groups have the same members (one stage: `model` is `tensor`) the first of these names holds: self (this
    rank alone), tensor, context, data (over which gradients are averaged: data x context), pipeline, embedding (first
    and last stage, which share a tied embedding), model (tensor x pipeline), world.
    """
    tensor, context, data, pipeline = (
        frozenset(dist.get_process_group_ranks(group))
        for group in (ranks.tensor_group, ranks.context_group, ranks.gradient_group, ranks.pipeline_group)
    )
    # Ranks are laid out with tensor parallel fastest and pipeline slowest.
    block = ranks.world_size // ranks.pipeline_size
    shifts = [(stage - ranks.pipeline_rank) * block for stage in range(ranks.pipeline_size)]
    model = frozenset(member + shift for member in tensor for shift in shifts)
    named = [
        (frozenset({ranks.rank}), "self"),
        (tensor, "tensor"),
        (context, "context"),
        (data, "data"),
        (pipeline, "pipeline"),
        (frozenset({min(pipeline), max(pipeline)}), "embedding"),
        (model, "model"),
        (frozenset(range(ranks.world_size)), "world"),
    ]
    names: dict[frozenset[int], str] = {}
    for members, name in named:
        names.setdefault(members, name)
    return names


def _name_of(members: frozenset[int], names: dict[frozenset[int], str]) -> str:
    """A group's name; of two ranks that talk to each other, the name of the smallest group that both are in."""
    if members in names:
        return names[members]
    around = [known for known in names if members <= known]
    return names[min(around, key=len)] if around else "other"


def _counted(method: str, names: dict[frozenset[int], str], traffic: Traffic) -> Callable[..., Any]:
    """A method of ProcessGroup that notes the call and then does what it always did."""
    collective, whole = _METHODS[method]
    original = getattr(dist.ProcessGroup, method)

    def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        members = frozenset(dist.get_process_group_ranks(group))
        size = len(members)
        tensors = _flat(whole(*args))
        payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if collective in ("gather", "scatter"):
            payload *= size  # what every rank has is its part
        elif method in ("send", "recv"):
            members = frozenset({dist.get_rank(), dist.get_global_rank(group, args[1])})
        dtype = tensors[0].dtype if tensors else None
        traffic.calls.append(Call(collective, _name_of(members, names), size, payload, dtype, _in_backward()))
        return original(group, *args, **kwargs)

    return counted


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it


def _first(*args: Any) -> Any:
    return args[0]


def _second(*args: Any) -> Any:
    return args[1]


def _nothing(*args: Any) -> Any:
    return ()


def _flat(value: Any) -> list[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)]


# Method of ProcessGroup -> (collective, which argument is the whole tensor), with torch's older and newer names.
_METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "allreduce": ("all_reduce", _first),
    "allreduce_coalesced": ("all_reduce", _first),
    "allgather": ("all_gather", _first),
    "_allgather_base": ("all_gather", _first),
    "all_gather_single": ("all_gather", _first),
    "allgather_coalesced": ("all_gather", _first),
    "allgather_into_tensor_coalesced": ("all_gather", _first),
    "all_gather_single_coalesced": ("all_gather", _first),
    "reduce_scatter": ("reduce_scatter", _second),
    "_reduce_scatter_base": ("reduce_scatter", _second),
    "reduce_scatter_single": ("reduce_scatter", _second),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _second),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _second),
    "alltoall": ("all_to_all", _second),
    "alltoall_base": ("all_to_all", _second),
    "all_to_all_single": ("all_to_all", _second),
    "broadcast": ("broadcast", _first),
    "reduce": ("reduce", _first),
    "gather": ("gather", _second),
    "scatter": ("scatter", _first),
    "send": ("send", _first),
    "recv": ("recv", _first),
    "recv_anysource": ("recv", _first),
    "barrier": ("barrier", _nothing),
    "monitored_barrier": ("barrier", _nothing),
}
