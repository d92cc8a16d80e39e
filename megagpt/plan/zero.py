"""Rules of ZeRO's offload to host memory and to disks, and of ZeRO++.

Sources: DeepSpeed 0.19's runtime/zero/config.py, offload_config.py, stage_1_and_2.py, stage3.py, runtime/swap_tensor/
and utils/groups.py.
"""

from pathlib import PurePosixPath
from typing import Any

from megagpt.plan.config import RunConfig, is_count
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.wording import or_list

LEGACY_KEYS = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory inside offload_optimizer or offload_param",
}
"""Old names of DeepSpeed, and what is written instead."""
WEIGHTS_ON_DISK = (
    'offload_param.device="nvme" is not supported: DeepSpeed removes what it has written of earlier layers when the '
    'next one is cut, and checkpoints are loaded into weights in memory; use "cpu", and "nvme" for offload_optimizer'
)
DEFAULT_BUFFER_COUNT = 4  # deepspeed/runtime/zero/offload_config.py
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000  # deepspeed/runtime/zero/config.py
PIPELINED = ("pipeline_read", "pipeline_write")
DISK_BLOCK = 4096
"""Direct reads and writes begin and end at multiples of it."""
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


def swap_buffer_elements(deepspeed: DeepSpeedConfig) -> tuple[int, int]:
    """Buffers in host memory of an optimizer on a disk: how many, and about how many elements each holds at most."""
    zero = deepspeed.raw["zero_optimization"]
    count = zero["offload_optimizer"].get("buffer_count", DEFAULT_BUFFER_COUNT)
    return count, int(zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE))


def is_zero_plus_plus(deepspeed: DeepSpeedConfig) -> bool:
    """Whether weights are cut a second time within hosts, or sent with fewer bits."""
    return deepspeed.is_quantized or deepspeed.secondary_partition_size > 1


def check_zero(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> list[str]:
    """What `zero_optimization` asks for must exist, and go with the layout.

    Args:
        world_size: number of ranks.
    """
    zero = deepspeed.raw.get("zero_optimization", {})
    problems = [
        f"{key} is an old name: write {instead} instead"
        for key, instead in LEGACY_KEYS.items()
        if zero.get(key) is not None
    ]
    if zero.get("zenflow"):
        problems.append("zenflow is not supported; remove it, and use offload_optimizer")
    for key in ("offload_optimizer", "offload_param"):
        problems += _check_offload(key, zero, deepspeed.zero_stage)
    if deepspeed.optimizer_is_on_disk:
        problems += _check_swapping(run, zero)
    problems += _check_zero_plus_plus(run, zero, deepspeed.zero_stage, world_size)
    problems = [f"zero_optimization.{problem}" for problem in problems]
    if deepspeed.raw.get("zero_force_ds_cpu_optimizer"):
        problems.append(
            "zero_force_ds_cpu_optimizer=true asks for DeepSpeed's own CPU optimizer, which must be compiled; remove "
            "it: offloaded updates are torch's fused AdamW"
        )
    if deepspeed.optimizer_is_on_disk:
        problems += _check_aio(deepspeed.raw.get("aio", {}))
    return [f"{deepspeed.source}: {problem}" for problem in problems]


def _check_offload(key: str, zero: dict[str, Any], stage: int) -> list[str]:
    section = zero.get(key)
    if section is None:
        return []
    if not isinstance(section, dict):
        return [f'{key}={section!r} must be an object such as {{"device": "cpu"}}']
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        return [f'{key}.device={device!r} must be "cpu", "nvme" or "none"']
    if key == "offload_param" and device == "nvme":
        return [WEIGHTS_ON_DISK]
    if device == "none":
        return []
    problems = []
    if device == "nvme" and stage != 3:
        problems.append(f'{key}.device="nvme" needs ZeRO stage 3, but stage={stage}; use stage 3, or "cpu"')
    if key == "offload_param" and stage != 3:
        problems.append(
            f"{key} needs ZeRO stage 3, which cuts the weights, but stage={stage}; use stage 3 or remove it"
        )
    if section.get("super_offload"):
        problems.append(f"{key}.super_offload=true needs DeepSpeed's compiled CPU optimizer; remove it")
    if section.get("ratio", 1.0) != 1.0:
        problems.append(f"{key}.ratio={section['ratio']!r} needs DeepSpeed's compiled CPU optimizer; use 1.0")
    return problems


def _check_swapping(run: RunConfig, zero: dict[str, Any]) -> list[str]:
    """What master weights and moments on a disk need."""
    section, problems = zero["offload_optimizer"], []
    path = section.get("nvme_path")
    if not isinstance(path, str) or not PurePosixPath(path).is_absolute():
        problems.append(
            f"offload_optimizer.nvme_path={path!r} must be the absolute path of a folder on a local disk of each host"
        )
    # Besides master weights and moments the gradient has a buffer while a part is updated; the part that is read
    # ahead, or written behind, has as many.
    states = 2 + (2 if run.optimizer.name == "adamw" else 0)
    needed = states * (1 + sum(bool(section.get(key)) for key in PIPELINED))
    count = section.get("buffer_count", DEFAULT_BUFFER_COUNT)
    if not is_count(count) or count < needed:
        ahead = "".join(f" and {key}" for key in PIPELINED if section.get(key))
        problems.append(
            f"offload_optimizer.buffer_count={count!r} must be a whole number of at least {needed} with "
            f"optimizer.name={run.optimizer.name}{ahead}"
        )
    size = zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
    if not (is_count(size) or (isinstance(size, float) and size > 0 and size.is_integer())):
        problems.append(f"sub_group_size={size!r} must be a positive integer: weights that are in memory at once")
    return problems


def _check_aio(section: dict[str, Any]) -> list[str]:
    """How disks are read and written; DeepSpeed judges none of it."""
    problems = [
        f"aio.{key}={section[key]!r} must be a positive integer"
        for key in ("block_size", "queue_depth", "intra_op_parallelism")
        if key in section and not is_count(section[key])
    ]
    block = section.get("block_size")
    if isinstance(block, int) and is_count(block) and block % DISK_BLOCK:
        problems.append(f"aio.block_size={block} must be a multiple of {DISK_BLOCK}, the blocks of disks")
    problems += [
        f"aio.{key}={section[key]!r} must be true or false"
        for key in ("single_submit", "overlap_events", "use_gds")
        if key in section and not isinstance(section[key], bool)
    ]
    if section.get("use_gds") is True:
        problems.append("aio.use_gds=true reads weights into GPU memory, and they are not on the disk; remove it")
    return problems


def _check_zero_plus_plus(run: RunConfig, zero: dict[str, Any], stage: int, world_size: int) -> list[str]:
    tensor = run.parallel.tensor_model_parallel_size
    problems = []
    if zero.get("zero_quantized_nontrainable_weights"):
        problems.append("zero_quantized_nontrainable_weights=true has no use, as all weights are trained; remove it")
    size = zero.get("zero_hpz_partition_size", 1)
    if not is_count(size):
        return [*problems, f"zero_hpz_partition_size={size!r} must be a positive integer"]
    asked = [f"{key}=true" for key in QUANTIZED if zero.get(key)]
    if size > 1:
        asked.append(f"zero_hpz_partition_size={size}")
    for setting in asked:
        if stage != 3:
            problems.append(f"{setting} (ZeRO++) needs ZeRO stage 3, but stage={stage}; use stage 3 or remove it")
        elif tensor > 1:
            # DeepSpeed cuts the list of all ranks into consecutive groups, whatever they hold
            problems.append(
                f"{setting} (ZeRO++) would mix the tensor-parallel ranks' parts; remove it, or set "
                "parallel.tensor_model_parallel_size=1"
            )
    if size > 1 and world_size % size:
        works = or_list(n for n in range(1, world_size + 1) if world_size % n == 0)
        problems.append(f"zero_hpz_partition_size={size} must divide the {world_size} ranks; use {works}")
    return problems
