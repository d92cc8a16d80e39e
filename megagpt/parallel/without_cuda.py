"""The one place that makes Megatron-Core and DeepSpeed run where there is no CUDA device.

Megatron-Core asks torch.cuda for the current device and for the random state of the device. On a host without CUDA
both questions have an answer of the same meaning: the CPU, and the CPU's random state. With these few functions
replaced, the very same model code runs on gloo ranks. On a CUDA host nothing is touched.

Where torch's matrix product is slow on the host's processor, a faster one takes its place: see `cpu_kernels`.
"""

import importlib
import os
from typing import Any

import torch

from megagpt.parallel.cpu_kernels import mkl_is_slow, multiply_with_onednn


def support_hosts_without_cuda() -> None:
    """Answer Megatron-Core's questions about the CUDA device with the CPU, if there is no CUDA device; idempotent."""
    if torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as mcore_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    if mkl_is_slow():
        multiply_with_onednn()


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
