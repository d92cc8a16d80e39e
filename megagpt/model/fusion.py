"""Elementwise functions that are one kernel on GPUs.

Eager torch reads and writes its tensors once per operation, and on a GPU that takes longer than computing. torch's
compiler (`torch.compile`) makes one kernel of a function, which rounds its result once and not after each operation.
Triton, which it uses, needs a C compiler on the host; without one the functions run as they are written.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from megagpt.errors import in_one_line
from megagpt.plan import Plan

R = TypeVar("R")


class Fusable(Generic[R]):
    """A function of tensors that is compiled once `fuse` has found that this works.

    Args:
        function: computes on any device; may write to its tensors; autograd does not look into it.
    """

    are_fused = False
    """Of this process."""

    def __init__(self, function: Callable[..., R]):
        self.eager = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Callable[..., R]:
        """One kernel, or few, for each kind of input."""
        return torch.compile(self.eager)

    def __call__(self, *args: Any) -> R:
        """Compute."""
        if not Fusable.are_fused:
            return self.eager(*args)
        # A tensor that asks for gradients would be another kind of input.
        return self.compiled(*(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args))


def fuse(plan: Plan, device: torch.device, gather: Callable[[str], list[str]]) -> str | None:
    """Have elementwise functions compiled from now on, if this device gains by it. Collective; all ranks do the same.

    Args:
        plan: gives `training.compile`.
        device: this rank's; nothing is compiled for CPUs.
        gather: gives what all ranks say, in rank order.

    Returns:
        What to tell the user: why it cannot be done; None: it is done, or not wanted.
    """
    Fusable.are_fused = False
    if device.type != "cuda" or not plan.run.training.compile:
        return None
    obstacles = gather(_obstacle(device))
    rank = next((rank for rank, obstacle in enumerate(obstacles) if obstacle), None)
    Fusable.are_fused = rank is None
    if rank is None:
        return None
    return (
        f"elementwise functions are not compiled, which costs time: rank {rank}: {obstacles[rank]} (with a C compiler "
        "and Python's headers on all hosts they are; training.compile=false silences this)"
    )


def _obstacle(device: torch.device) -> str:
    """Why this rank cannot compile; empty if it can."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # some small kernels are not worth processes of their own
    probe = torch.linspace(-1, 1, 1000, device=device)
    try:
        found: Any = torch.compile(_probed)(probe)
    except Exception as error:  # whatever the compiler meets on this host
        return in_one_line(error)
    return "" if torch.allclose(found, _probed(probe)) else "the compiled probe is wrong"


def _probed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.sigmoid(tensor) + 1
