"""Views into DeepSpeed's partitioned state: which part of which parameter's fp32 master copy this rank owns.

ZeRO keeps the master weights of a parameter group in one flat tensor that is cut over the data- and context-parallel
ranks, at places that have nothing to do with the parameters' borders. A fragment is the overlap of one parameter with
this rank's part. Checkpoints read and write fragments and never talk to other ranks about it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose master copy and moments live on this rank."""

    name: str
    """Canonical name of the parameter."""
    start: int
    """Offset of the part in this rank's flattened tensor-parallel shard."""
    master: Tensor
    """fp32 weights, 1-D, a view: writing to it changes the optimizer's copy."""
    _flat: Tensor
    _flat_start: int
    _optimizer: torch.optim.Optimizer

    @property
    def stop(self) -> int:
        """Offset of the end of the part."""
        return self.start + self.master.numel()

    def moment(self, key: str) -> Tensor:
        """The optimizer's state tensor `key` (`exp_avg`, ...) of this part: 1-D, a view unless there was no update."""
        state = self._optimizer.state[self._flat]
        if key not in state:  # fp16 may have skipped all steps so far
            return torch.zeros_like(self.master)
        return state[key].narrow(0, self._flat_start, self.master.numel())

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
    """All fragments of this rank.

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
    return fragments


def _flat_fragment(name: str, parameter: Any, zero: Any) -> Fragment:
    mapping = parameter._hp_mapping
    flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    master = flat.detach().narrow(0, address.start, address.numel)
    return Fragment(name, mapping.lp_fragment_address.start, master, flat, address.start, zero.optimizer)


def _stage3_fragment(name: str, parameter: Any, zero: Any, gradient_rank: int) -> Fragment:
    group, flat_start, part = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    start = min(gradient_rank * part, parameter.ds_numel)
    # The last ranks' parts are padded.
    numel = min(part, parameter.ds_numel - start)
    return Fragment(name, start, flat.detach().narrow(0, flat_start, numel), flat, flat_start, zero.optimizer)
