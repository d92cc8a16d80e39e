"""Which FlashAttention computes attention on GPUs: the one that torch brings, or a newer one installed beside it.

torch's fused attention can be handed to FlashAttention 3 (arXiv 2407.08608; Hopper) or 4 (Hopper and Blackwell). Before
a run uses one it has to show on each rank's device, with the heads and windows of the model, that its results and
gradients are as close to those in fp64 as torch's own are. So has torch's kernel for windows and documents, beside the
blocks and documents that are attended to one after the other without it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt.errors import ConfigError, in_one_line
from megagpt.model.causal_attention import causal_attention
from megagpt.model.documents import Documents, document_attention
from megagpt.model.transformer_config import softmax_scale
from megagpt.model.varlen import torchs_kernel, use_kernel
from megagpt.plan import Plan

ALLOWED = 3.0
"""How many times as far from fp64 as torch's own kernel another one may be."""
SAMPLES, LENGTH, LONGEST_WINDOW = 2, 512, 192
"""Of the proof. The window is not a multiple of the kernels' blocks; documents end within blocks."""
DOCUMENTS = ((200, 312), (512,))

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A FlashAttention that torch can hand its attention to."""

    name: str
    """As torch and `training.flash_attention` call it."""
    module: str
    """Its first module."""
    package: str
    """What to install."""
    majors: tuple[int, ...]
    """Major compute capabilities of the devices that it is for."""


KERNELS = (
    Kernel("FA3", "flash_attn_interface", "flash_attn_interface (flash-attention/hopper)", (9,)),
    Kernel("FA4", "flash_attn", "flash-attn-4", (9, 10)),
)
"""The first that is installed and right is used."""


@dataclass(frozen=True)
class Trial:
    """What came of trying a kernel on one rank."""

    is_good: bool
    obstacle: str = ""
    """Why it cannot be used; empty if it is not for this device or not installed."""


def choose_flash_attention(plan: Plan, device: torch.device, gather: Callable[[Trial], list[Trial]]) -> str | None:
    """Put the kernels that the plan asks for in place for this process. Collective; all ranks get the same.

    Args:
        plan: gives `training.flash_attention`, heads, windows and precision.
        device: this rank's; nothing is done if it is not a CUDA device.
        gather: gives the trials of all ranks, in rank order.

    Returns:
        What to tell the user; None: torch's own kernels are used, and nothing newer was found.

    Raises:
        ConfigError: the one asked for cannot be used.
    """
    asked = plan.run.training.flash_attention
    is_cuda = device.type == "cuda" and torch.version.hip is None
    if not is_cuda or not can_be_used(plan):
        return None
    remark = _choose_kernel_of_runs(plan, device, gather)
    if asked == "torch" or plan.run.training.deterministic:
        return remark
    told = [] if remark is None else [remark]
    for kernel in (kernel for kernel in KERNELS if asked in ("auto", kernel.name)):
        trials = gather(_try(kernel, plan, device))
        bad = _first_bad(trials)
        if bad is None:
            told.append(f"attention by {kernel.name}, which computes here what torch's own kernel does")
            break
        restore()
        rank, trial = bad
        if asked != "auto":
            obstacle = (
                trial.obstacle or f"it is not installed there ({kernel.package}), or not for its device and this torch"
            )
            raise ConfigError(
                f"training.flash_attention={asked} cannot be used on rank {rank}: {obstacle}; use auto or torch"
            )
        if trial.obstacle:
            told.append(f"{kernel.name} is installed but not used: rank {rank}: {trial.obstacle}")
    return "; ".join(told) or None


def _choose_kernel_of_runs(plan: Plan, device: torch.device, gather: Callable[[Trial], list[Trial]]) -> str | None:
    """Use torch's kernel for windows and documents if all ranks have it and it is right; what to tell if it is not."""
    use_kernel(False)
    has_it = torchs_kernel() is not None
    bad = _first_bad(gather(_tried(partial(use_kernel, True), plan, device) if has_it else Trial(False)))
    use_kernel(bad is None)
    if bad is None or not bad[1].obstacle:
        return None
    return f"torch's kernel for windows and documents is not used: rank {bad[0]}: {bad[1].obstacle}"


def _first_bad(trials: list[Trial]) -> tuple[int, Trial] | None:
    return next(((rank, trial) for rank, trial in enumerate(trials) if not trial.is_good), None)


def can_be_used(plan: Plan) -> bool:
    """Whether the newer kernels can compute the model's attention: 16 bits, no dropout, no bent scores."""
    model = plan.model
    return plan.precision != "fp32" and model.attention_dropout == 0 and model.attn_logit_softcapping is None


def activate(name: str) -> None:
    """Have torch's attention computed by another FlashAttention, also where torch would take cuDNN's kernel."""
    torch.nn.attention.activate_flash_attention_impl(name)
    torch.backends.cuda.enable_cudnn_sdp(False)


def restore() -> None:
    """Have it computed as it was before `activate`."""
    if torch_can_change():
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        torch.backends.cuda.enable_cudnn_sdp(True)


def torch_can_change() -> bool:
    """Whether this torch can be told which FlashAttention to use (since 2.11)."""
    names = ("activate_flash_attention_impl", "restore_flash_attention_impl")
    return all(hasattr(torch.nn.attention, name) for name in names)


def _try(kernel: Kernel, plan: Plan, device: torch.device) -> Trial:
    if not torch_can_change() or torch.cuda.get_device_capability(device)[0] not in kernel.majors:
        return Trial(False)
    restore()
    return _tried(partial(activate, kernel.name), plan, device, kernel.module)


def _tried(activate: Callable[[], None], plan: Plan, device: torch.device, module: str | None = None) -> Trial:
    """`prove`, whatever it meets; without the module of that name there is nothing to tell."""
    try:
        return prove(activate, plan, device)
    except Exception as error:  # whatever a package that does not fit this host raises
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module:
            return Trial(False)
        return Trial(False, in_one_line(error))


def prove(activate: Callable[[], None], plan: Plan, device: torch.device) -> Trial:
    """Activate a kernel and compare it with what was there before.

    Args:
        activate: puts the kernel in place.
        plan: gives the heads of a rank, windows and the precision.
        device: where to compute.
    """
    cases = list(_cases(plan, device))
    inputs = _inputs(plan, device)
    exact = [_reference(attend, inputs) for _, attend in cases]
    before = [_distances(attend, inputs, right) for (_, attend), right in zip(cases, exact, strict=True)]
    activate()
    for (name, attend), right, allowed in zip(cases, exact, before, strict=True):
        for what, distance, limit in zip("oqkv", _distances(attend, inputs, right), allowed, strict=True):
            if not distance <= ALLOWED * limit:  # also if it is none
                of = "the result" if what == "o" else f"the gradient of {what}"
                return Trial(False, f"in {name}, {of} is {distance:.1e} from that in fp64, without it {limit:.1e}")
    return Trial(True)


def _cases(plan: Plan, device: torch.device) -> Iterator[tuple[str, Attend]]:
    places = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in DOCUMENTS])
    documents = Documents.of(places, device, attention=True, positions=False, padded=False)
    windows = {plan.model.window_of_layer(index) for index in range(plan.model.num_layers)}
    scale = softmax_scale(plan.model)
    for window in sorted({min(window or LENGTH, LONGEST_WINDOW if window else LENGTH) for window in windows}):
        words = f"windows of {window}" if window < LENGTH else "causal attention"
        given = window if window < LENGTH else None
        yield words, partial(causal_attention, scale=scale, window=given)
        yield f"{words} of documents", partial(document_attention, documents=documents, scale=scale, window=given)


def _inputs(plan: Plan, device: torch.device) -> list[Tensor]:
    """Query [B, N, S, D], key and value [B, G, S, D] of one rank, in memory as [S, B, ., D] as in the model, and the
    gradient of the result."""
    model, tensor, context = plan.model, plan.tensor_parallel_size, plan.context_parallel_size
    groups = max(1, model.num_query_groups // tensor)
    heads = model.num_attention_heads // tensor // context
    groups = math.lcm(groups, context) // context
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float16
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(LENGTH, SAMPLES, number, model.kv_channels, generator=generator)
        .to(device, dtype)
        .permute(1, 2, 0, 3)
        for number in (heads, groups, groups, heads)
    ]


def _results(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """Result and gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


def _reference(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return _results(attend, [tensor.double() for tensor in inputs])


def _distances(attend: Attend, inputs: list[Tensor], right: list[Tensor]) -> list[float]:
    """Relative to the size of what is right, of the result and the three gradients."""
    found = _results(attend, inputs)
    return [float((one - two).norm() / two.norm()) for one, two in zip(found, right, strict=True)]
