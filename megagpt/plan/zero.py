"""Rules of ZeRO's offload to host memory and of ZeRO++.

Sources: DeepSpeed 0.19's runtime/zero/config.py, offload_config.py, stage_1_and_2.py, stage3.py and utils/groups.py.
"""

from typing import Any

from megagpt.plan.config import RunConfig, is_count
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.wording import or_list

OFFLOADS = {"offload_optimizer": "optimizer state", "offload_param": "weights"}
LEGACY_KEYS = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory inside offload_optimizer or offload_param",
}
"""Old names of DeepSpeed, and what is written instead."""
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


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
    for key in OFFLOADS:
        problems += _check_offload(key, zero, deepspeed.zero_stage)
    problems += _check_zero_plus_plus(run, zero, deepspeed.zero_stage, world_size)
    problems = [f"zero_optimization.{problem}" for problem in problems]
    if deepspeed.raw.get("zero_force_ds_cpu_optimizer"):
        problems.append(
            "zero_force_ds_cpu_optimizer=true asks for DeepSpeed's own CPU optimizer, which must be compiled; remove "
            "it: offloaded updates are torch's fused AdamW"
        )
    return [f"{deepspeed.source}: {problem}" for problem in problems]


def _check_offload(key: str, zero: dict[str, Any], stage: int) -> list[str]:
    section = zero.get(key)
    if section is None:
        return []
    if not isinstance(section, dict):
        return [f'{key}={section!r} must be an object such as {{"device": "cpu"}}']
    device = section.get("device", "none")
    if device == "nvme":
        return [f'{key}.device="nvme" is not supported: checkpoints read the {OFFLOADS[key]} from memory; use "cpu"']
    if device not in ("none", "cpu"):
        return [f'{key}.device={device!r} must be "cpu" or "none"']
    if device == "none":
        return []
    problems = []
    if key == "offload_param" and stage != 3:
        problems.append(
            f"{key} needs ZeRO stage 3, which cuts the weights, but stage={stage}; use stage 3 or remove it"
        )
    if section.get("super_offload"):
        problems.append(f"{key}.super_offload=true needs DeepSpeed's compiled CPU optimizer; remove it")
    if section.get("ratio", 1.0) != 1.0:
        problems.append(f"{key}.ratio={section['ratio']!r} needs DeepSpeed's compiled CPU optimizer; use 1.0")
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
