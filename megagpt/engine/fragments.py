"""Views into DeepSpeed's partitioned state: which part of which parameter's fp32 master copy this rank owns.

ZeRO keeps the master weights of a parameter group in one flat tensor that is cut over the data- and context-parallel
ranks, at places that have nothing to do with the parameters' borders. A fragment is the overlap of one parameter with
this rank's part. Checkpoints read and write fragments and never talk to other ranks about it.

Under stage 3 the parts of a parameter group are several flat tensors, the sub-groups. Where the optimizer is on a disk,
one sub-group is in memory at a time, except for those that are too small for the disk.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose master copy and moments live on this rank."""

    name: str
    """Canonical name of the parameter."""
    start: int
    """Offset of the part in this rank's flattened tensor-parallel shard."""
    numel: int
    """Number of its elements."""
    group: int
    """The flat tensor that it is a part of; what has the same one is in memory together."""
    _flat: Tensor
    _flat_start: int
    _optimizer: torch.optim.Optimizer

    @property
    def stop(self) -> int:
        """Offset of the end of the part."""
        return self.start + self.numel

    @property
    def master(self) -> Tensor:
        """fp32 weights, 1-D, a view: writing to it changes the optimizer's copy."""
        return self._flat.detach().narrow(0, self._flat_start, self.numel)

    def moment(self, key: str) -> Tensor:
        """The optimizer's state tensor `key` (`exp_avg`, ...) of this part: 1-D, a view unless there was no update."""
        state = self._optimizer.state[self._flat]
        if key not in state:  # fp16 may have skipped all steps so far
            return torch.zeros_like(self.master)
        return state[key].narrow(0, self._flat_start, self.numel)

    def prepare_state(self, step: int, keys: Iterable[str]) -> None:
        """Make sure that the optimizer has state tensors, and that they count `step` updates."""
        keys = tuple(keys)
        if not keys:
            return
        state = self._optimizer.state[self._flat]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(self._flat)
        # torch's fused AdamW keeps the counter on the parameter's device.
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=self._flat.device)


def local_fragments(named: Iterable[tuple[str, nn.Parameter]], zero: Any, gradient_rank: int) -> list[Fragment]:
    """All fragments of this rank, one group after the other.

    Args:
        named: canonical name and parameter of this rank.
        zero: DeepSpeed's optimizer wrapper (stages 1-3 or BF16_Optimizer).
        gradient_rank: this rank's place among the ranks that ZeRO cuts over.
    """
    fragments = []
    for name, parameter in named:
        if hasattr(parameter, "ds_id"):
            fragments.append(_stage3_fragment(name, parameter, zero, gradient_rank))
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            fragments.append(_flat_fragment(name, parameter, zero))
    return sorted(fragments, key=lambda fragment: fragment.group)


def _flat_fragment(name: str, parameter: Any, zero: Any) -> Fragment:
    mapping = parameter._hp_mapping
    flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return Fragment(name, start, address.numel, mapping.param_group_index, flat, address.start, zero.optimizer)


def _stage3_fragment(name: str, parameter: Any, zero: Any, gradient_rank: int) -> Fragment:
    group, flat_start, part = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    start = min(gradient_rank * part, parameter.ds_numel)
    # The last ranks' parts are padded.
    numel = min(part, parameter.ds_numel - start)
    return Fragment(name, start, numel, group, flat, flat_start, zero.optimizer)


def is_on_disk(zero: Any) -> bool:
    """Whether DeepSpeed's optimizer wrapper keeps sub-groups on a disk."""
    return bool(getattr(zero, "swap_optimizer", False))


def groups_in_memory(fragments: Iterable[Fragment], zero: Any, change: bool) -> Generator[list[Fragment], None, None]:
    """The fragments, in lists each of which is in memory until the next one is asked for, or the iterator is closed.

    Args:
        fragments: of this rank.
        zero: DeepSpeed's optimizer wrapper; no step of it may be under way.
        change: whether what is written to them is to be kept.
    """
    groups: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        groups.setdefault(fragment.group, []).append(fragment)
    if not is_on_disk(zero):
        yield [fragment for group in groups.values() for fragment in group]
        return
    for index, group in groups.items():
        if not zero._swappable_optimizer_subgroup(index):
            yield group
            continue
        zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield group
        finally:
            if change:
                zero._optimizer_states_and_gradient_swap_out(index)
            else:
                zero._release_swap_buffers(index)


def share_fp32_weights(zero: Any) -> None:
    """Let fp32 weights be their own master copy, which DeepSpeed would keep beside them: 4 bytes per parameter.

    The update then changes this rank's part of the weights themselves, and DeepSpeed's copy after it copies a tensor to
    itself. Masters in host memory and those of 16-bit weights stay as they are.

    Args:
        zero: DeepSpeed's optimizer wrapper.
    """
    if hasattr(zero, "single_partition_of_fp32_groups"):
        masters = zero.single_partition_of_fp32_groups
        ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
        weights = [parts[rank] for parts, rank in zip(zero.parallel_partitioned_bit16_groups, ranks, strict=True)]
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        masters, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    else:
        return
    for master, weight in zip(masters, weights, strict=True):
        if weight is not None and (master.dtype, master.device) == (weight.dtype, weight.device):
            master.data = weight.data
    for parameter in (parameter for group in getattr(zero, "bit16_groups", ()) for parameter in group):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # a view of the copy would keep it in memory
            place = mapping.hp_fragment_address
            mapping.hp_fragment = masters[mapping.param_group_index].narrow(0, place.start, place.numel)
