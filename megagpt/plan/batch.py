"""Batch sizes: samples per step = micro-batch x micro-batches (gradient accumulation) x data-parallel ranks.

Missing values are filled in as DeepSpeed does (`DeepSpeedConfig._set_batch_related_parameters`), but a remainder is an
error that names values which multiply out.
"""

from dataclasses import dataclass

from megagpt.errors import ConfigError
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.wording import or_list


@dataclass(frozen=True)
class Batch:
    """Sizes of one step."""

    microbatch_size: int
    """Samples per micro-batch on one data-parallel rank."""
    num_microbatches: int
    """Micro-batches per step (gradient accumulation)."""
    global_batch_size: int
    """Samples per step over all ranks."""


def resolve_batch(deepspeed: DeepSpeedConfig, data_parallel_size: int) -> Batch:
    """Resolve the three batch sizes.

    Raises:
        ConfigError: neither the global nor the micro-batch is given, or the sizes do not multiply out.
    """
    total = deepspeed.train_batch_size
    micro = deepspeed.train_micro_batch_size_per_gpu
    accumulation = deepspeed.gradient_accumulation_steps
    ranks = data_parallel_size
    if total is None and micro is None:
        raise ConfigError(
            f"{deepspeed.source}: neither train_batch_size nor train_micro_batch_size_per_gpu is given; write "
            "train_batch_size and train_micro_batch_size_per_gpu"
        )
    if total is None:
        assert micro is not None
        return Batch(micro, accumulation or 1, micro * (accumulation or 1) * ranks)
    if micro is not None and accumulation is not None:
        if total != micro * accumulation * ranks:
            raise ConfigError(_contradiction(deepspeed, total, micro, accumulation, ranks))
        return Batch(micro, accumulation, total)
    if micro is None:
        # train_batch_size alone means one micro-batch per step
        accumulation = accumulation or 1
        _require_multiple(deepspeed, total, accumulation, "gradient_accumulation_steps", ranks)
        return Batch(total // (accumulation * ranks), accumulation, total)
    _require_multiple(deepspeed, total, micro, "train_micro_batch_size_per_gpu", ranks)
    return Batch(micro, total // (micro * ranks), total)


def _require_multiple(deepspeed: DeepSpeedConfig, total: int, factor: int, key: str, ranks: int) -> None:
    unit = factor * ranks
    if total % unit == 0:
        return
    below = total // unit * unit
    nearest = [size for size in (below, below + unit) if size > 0]
    raise ConfigError(
        f"{deepspeed.source}: train_batch_size={total} is not a multiple of {key} x data-parallel size = "
        f"{factor} x {ranks} = {unit}; use {or_list(nearest)}"
    )


def _contradiction(deepspeed: DeepSpeedConfig, total: int, micro: int, accumulation: int, ranks: int) -> str:
    product = micro * accumulation * ranks
    fixes = [f"train_batch_size={product}"]
    if total % (micro * ranks) == 0:
        fixes.append(f"gradient_accumulation_steps={total // (micro * ranks)}")
    if total % (accumulation * ranks) == 0:
        fixes.append(f"train_micro_batch_size_per_gpu={total // (accumulation * ranks)}")
    return (
        f"{deepspeed.source}: train_batch_size={total} is not train_micro_batch_size_per_gpu x "
        f"gradient_accumulation_steps x data-parallel size = {micro} x {accumulation} x {ranks} = {product}; use "
        f"{or_list(fixes)}, or remove one of the three"
    )
