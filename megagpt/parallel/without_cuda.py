"""The one place that makes Megatron-Core and DeepSpeed run where there is no CUDA device.

Megatron-Core asks torch.cuda for the current device, for the random state of the device and for streams. On a host
without CUDA these questions have an answer of the same meaning: the CPU, its random state and its only stream. With
these few functions replaced, the very same model code runs on gloo ranks. On a CUDA host nothing is touched.

Where torch's matrix product or attention is slow on the host's processor, a faster one takes its place, and freed
memory is used again: see `cpu_kernels`, `cpu_attention` and `cpu_memory`.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagpt.parallel.cpu_attention import attend_in_blocks, slow_types
from megagpt.parallel.cpu_kernels import mkl_is_slow, multiply_with_onednn
from megagpt.parallel.cpu_memory import keep_freed_memory


def support_hosts_without_cuda() -> None:
    """Answer Megatron-Core's questions about the CUDA device with the CPU, if there is no CUDA device; idempotent."""
    if torch.cuda.is_available() or torch.cuda.Stream is _CpuStream:
        return
    import megatron.core.tensor_parallel.mappings as mcore_mappings
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.Stream = _CpuStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
    torch.cuda.stream = torch.cpu.stream  # type: ignore[assignment]
    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mcore_dispatcher.maybe_move_tensor_to_cpu = _as_on_host
    mcore_mappings._gather_along_first_dim = _gather_rows(mcore_mappings._gather_along_first_dim)
    mcore_mappings._reduce_scatter_along_first_dim = _scatter_rows(mcore_mappings._reduce_scatter_along_first_dim)
    keep_freed_memory()
    if mkl_is_slow():
        multiply_with_onednn()
    if types := slow_types():
        attend_in_blocks(types)


class _CpuStream(torch.cpu.Stream):
    """What is put on it is done at once; torch's own gives no event, which Megatron-Core wants to wait for."""

    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()


def _as_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor as the host reads it; Megatron-Core's own turns only those of a GPU into arrays."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather_rows(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron-Core's gathering along the first dimension, also for unequal sizes, which gloo does not gather."""

    def gather(input_: Tensor, group: Any, output_split_sizes: Any = None, *args: Any) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, None, *args)
        output = input_.new_zeros(sum(output_split_sizes), *input_.shape[1:])
        output.split(list(output_split_sizes))[group.rank()].copy_(input_)
        torch.distributed.all_reduce(output, group=group)
        return output

    return gather


def _scatter_rows(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron-Core's summing and scattering along the first dimension, also to unequal sizes."""

    def scatter(input_: Tensor, group: Any, input_split_sizes: Any = None, *args: Any) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, None, *args)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    return scatter


def prepare_deepspeed() -> None:
    """Import DeepSpeed as megagpt runs it: for the CPU, fp16 included, where there is no CUDA device, and without its
    shared-memory all-reduce for CPU ranks.

    That one needs a compiler at run time, and leaves a 69 MB file per rank in /dev/shm behind when a rank is killed,
    which after some hundred runs fills the machine's memory. Plain gloo gives the same sums.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it guesses, and warns about its guess
    # `deepspeed.comm.torch` as an attribute is torch itself: deepspeed.comm star-imports a module that imports torch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    if not torch.cuda.is_available():
        _allow_fp16_on_cpu()


def _allow_fp16_on_cpu() -> None:
    """Let DeepSpeed run fp16 on any CPU: it asks for oneDNN's fast kernels, but torch computes without them, slower."""
    accelerator: Any = importlib.import_module("deepspeed.accelerator")
    kind = type(accelerator.get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
