"""Activation checkpointing: runs of layers that keep their input only and are computed again in the backward pass.

The kept input can be split over the tensor-parallel ranks, moved to host memory, or both: hooks of autograd see what
Megatron-Core's checkpoint saves, which is that input and nothing else.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megagpt.model.documents import Documents
from megagpt.model.layers import Embedding, Layer
from megagpt.plan import Plan
from megagpt.plan.recompute import layer_runs

Function = Callable[..., Tensor]
"""[S, B, H] -> [S, B, H]; transformer layers take the documents of the samples, too."""


class RecomputedLayers:
    """Consecutive layers as one function [S, B, H] -> [S, B, H] that keeps its input only.

    Args:
        layers: the layers, in order.
        distribute: each tensor-parallel rank keeps its part of the input, which all of them hold; one all-gather per
            backward pass.
        offload: the input is kept in host memory.
    """

    def __init__(self, layers: Sequence[Function], distribute: bool = False, offload: bool = False):
        self._layers = tuple(layers)
        self._distribute, self._offload = distribute, offload

    def __call__(self, hidden_SBH: Tensor, documents: Documents | None = None) -> Tensor:
        """Apply all layers."""
        if not torch.is_grad_enabled():
            return self._compute(hidden_SBH, documents)
        moves = self._distribute or self._offload
        with saved_tensors_hooks(self._pack, self._unpack) if moves else contextlib.nullcontext():
            # Megatron-Core's checkpoint restores its own generators; DeepSpeed's would replay other dropout masks.
            return tensor_parallel.checkpoint(partial(self._compute, documents=documents), False, hidden_SBH)

    def _compute(self, hidden_SBH: Tensor, documents: Documents | None) -> Tensor:
        for layer in self._layers:
            hidden_SBH = layer(hidden_SBH, documents)
        return hidden_SBH

    def _pack(self, tensor: Tensor) -> tuple[Tensor, torch.Size, torch.device]:
        shape, device = tensor.shape, tensor.device
        if self._distribute:
            tensor = tensor_parallel.split_tensor_into_1d_equal_chunks(tensor.contiguous(), new_buffer=True)
        if self._offload:
            # Pinned memory and the current stream: neither copy makes the host wait, and both are in order with the
            # computation.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            tensor = host.copy_(tensor, non_blocking=True)
        return tensor, shape, device

    def _unpack(self, packed: tuple[Tensor, torch.Size, torch.device]) -> Tensor:
        tensor, shape, device = packed
        tensor = tensor.to(device, non_blocking=True)
        if self._distribute:
            tensor = tensor_parallel.gather_split_1d_tensor(tensor).view(shape)
        return tensor


def takes_documents(function: Any) -> bool:
    """Whether a function of a stage takes the documents of the samples as its second argument."""
    return isinstance(function, (Embedding, Layer, RecomputedLayers))


def with_recomputation(functions: Sequence[Any], plan: Plan) -> list[Function]:
    """Replace the transformer layers among a stage's functions by runs of them, as the Plan asks.

    Args:
        functions: the stage's pipeline layers in order; its transformer layers stand together.
        plan: gives granularity, method and what happens to the kept inputs.
    """
    training = plan.run.training
    layers = [function for function in functions if isinstance(function, Layer)]
    if not layers:
        return list(functions)
    first = functions.index(layers[0])
    assert list(functions[first : first + len(layers)]) == layers, "a stage's transformer layers stand together"
    grouped: list[Function] = []
    start = 0
    for run in layer_runs(training, len(layers)):
        members = layers[start : start + run.num_layers]
        start += run.num_layers
        if run.is_recomputed:
            grouped.append(
                RecomputedLayers(members, training.distribute_saved_activations, training.offload_saved_activations)
            )
        else:
            grouped += members
    return [*functions[:first], *grouped, *functions[first + len(layers) :]]
