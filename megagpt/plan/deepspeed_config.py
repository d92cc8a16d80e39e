"""Read-only view of the DeepSpeed JSON, the home of batch sizes, precision, ZeRO and gradient clipping.

Values are judged one by one here; what they mean together with the run config is judged in `rules.py`.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagpt.errors import ConfigError, exit_code_of
from megagpt.plan.config import is_count
from megagpt.plan.deepspeed_keys import OFFLOAD_KEYS, REFUSED_KEYS, SECTION_KEYS, TOP_LEVEL_KEYS
from megagpt.plan.wording import suggestion

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = ("fp32", "bf16", "fp16")
COMMUNICATION_KEYS = ("communication_data_type", "seq_parallel_communication_data_type")
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DEFAULT_GRADIENT_CLIPPING = 1.0  # deepspeed/runtime/constants.py: GRADIENT_CLIPPING_DEFAULT
DEFAULT_INITIAL_SCALE_POWER = 16  # deepspeed/runtime/precision_config.py: DeepSpeedFP16Config
FP16_RANGES = {
    "initial_scale_power": (0, 32),
    "loss_scale_window": (1, None),
    "hysteresis": (1, 16),
    "min_loss_scale": (1, None),
}
"""Smallest and largest value of fp16's whole numbers."""
REFUSED_OPTIONS = {
    ("fp16", "fp16_master_weights_and_grads"): "keeps no fp32 master weights, which checkpoints hold; remove it",
    ("bf16", "bf16_master_weights_and_grads"): "keeps no fp32 master weights, which checkpoints hold; remove it",
    ("bf16", "bf16_optimizer_states"): "keeps moments in bf16, but checkpoints hold them in fp32; remove it",
}
"""Options of a section that DeepSpeed knows and that are refused when true, with the reason and the fix."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What megagpt reads from a DeepSpeed JSON; the JSON itself stays untouched."""

    raw: dict[str, Any]
    """The whole JSON, as written. Not to be changed: `Plan.engine_config` makes a copy."""
    source: str
    """File name, for messages."""
    train_batch_size: int | None
    """Samples per step, if given."""
    train_micro_batch_size_per_gpu: int | None
    """Samples per micro-batch and data-parallel rank, if given."""
    gradient_accumulation_steps: int | None
    """Micro-batches per step, if given."""
    zero_stage: int
    """The stage as written, 0 to 3."""
    precision: Precision
    """Type of the weights in forward and backward passes."""
    grad_accum_dtype: Precision | None
    """Type in which gradients are accumulated, if given."""
    communication_data_type: Precision
    """Type in which gradients are sent: that of the weights, unless given."""
    gradient_clipping: float
    """Largest norm of the gradients; 0.0 is off; DeepSpeed 0.19's default is 1.0."""

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights and moments live in host memory or on a disk, and the update is made by the host."""
        return self._offload_device("offload_optimizer") != "none"

    @property
    def optimizer_is_on_disk(self) -> bool:
        """Whether master weights and moments are on a disk but for the part that is being updated."""
        return self._offload_device("offload_optimizer") == "nvme"

    @property
    def offloads_parameters(self) -> bool:
        """Whether the weights live in host memory until a layer needs them."""
        return self._offload_device("offload_param") != "none"

    @property
    def is_quantized(self) -> bool:
        """Whether ZeRO++ sends weights or gradients with fewer bits, which takes CUDA kernels."""
        zero = self.raw.get("zero_optimization", {})
        return any(zero.get(key) for key in ("zero_quantized_weights", "zero_quantized_gradients"))

    @property
    def secondary_partition_size(self) -> int:
        """Ranks over which ZeRO++ cuts a second copy of the weights (hpZ); 1 if there is none."""
        return int(self.raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))

    def _offload_device(self, key: str) -> str:
        section = self.raw.get("zero_optimization", {}).get(key)
        return str(section.get("device", "none")) if isinstance(section, dict) else "none"

    @property
    def loss_scale_is_dynamic(self) -> bool:
        """Whether fp16 finds the scale of the loss by itself (fp16.loss_scale 0 or not given)."""
        return self.raw.get("fp16", {}).get("loss_scale", 0) == 0

    @property
    def initial_loss_scale(self) -> float:
        """Scale of the loss at the first step of an fp16 run."""
        fp16 = self.raw.get("fp16", {})
        if self.loss_scale_is_dynamic:
            return float(2 ** fp16.get("initial_scale_power", DEFAULT_INITIAL_SCALE_POWER))
        return float(fp16["loss_scale"])


def load_deepspeed_config(path: str | Path) -> DeepSpeedConfig:
    """Read a DeepSpeed JSON.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or has unknown, misplaced or wrong keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        text = f"{path}: cannot be read ({error.strerror}); check the path"
        raise ConfigError(text, exit_code=exit_code_of(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    duplicates: list[str] = []

    def collect_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        duplicates.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=collect_pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if duplicates:
        raise ConfigError([f"{path}: key {key!r} appears twice; keep one" for key in duplicates])
    return deepspeed_config_from_dict(raw, source=str(path))


def deepspeed_config_from_dict(tree: dict[str, Any], source: str = "DeepSpeed config") -> DeepSpeedConfig:
    """Make the view of an in-memory DeepSpeed config.

    Args:
        tree: the JSON's content; copied.
        source: name put before each problem.

    Raises:
        ConfigError: unknown, misplaced or wrong keys; all problems are reported at once.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must be a JSON object ({{...}}), not {tree!r}")
    problems = [
        *_check_keys(tree),
        *_find_auto(tree),
        *_check_batch_sizes(tree),
        *_check_precision(tree),
        *_check_communication(tree),
        *_check_loss_scale(tree),
        *_check_gradients(tree),
    ]
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    data_types = tree.get("data_types", {})
    return DeepSpeedConfig(
        raw=copy.deepcopy(tree),
        source=source,
        train_batch_size=tree.get("train_batch_size"),
        train_micro_batch_size_per_gpu=tree.get("train_micro_batch_size_per_gpu"),
        gradient_accumulation_steps=tree.get("gradient_accumulation_steps"),
        zero_stage=tree.get("zero_optimization", {}).get("stage", 0),
        precision=_precision(tree),
        grad_accum_dtype=data_types.get("grad_accum_dtype"),
        communication_data_type=_communicated(tree),
        gradient_clipping=float(tree.get("gradient_clipping", DEFAULT_GRADIENT_CLIPPING)),
    )


def _check_keys(tree: dict[str, Any]) -> list[str]:
    problems = []
    for key in tree:
        if key in REFUSED_KEYS:
            problems.append(f"{key}: {REFUSED_KEYS[key]}; remove it here")
        elif key not in TOP_LEVEL_KEYS:
            problems.append(f"{key}: unknown key; {suggestion(key, TOP_LEVEL_KEYS)}")
    for name, known in SECTION_KEYS.items():
        section = tree.get(name, {})
        if not isinstance(section, dict):
            problems.append(f"{name}={section!r} must be an object with keys such as {known[0]}")
            continue
        problems += _unknown_keys(name, section, known)
    zero = tree.get("zero_optimization", {})
    for name, known in OFFLOAD_KEYS.items():
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict):
            problems += _unknown_keys(f"zero_optimization.{name}", section, known)
    return problems


def _unknown_keys(name: str, section: dict[str, Any], known: Sequence[str]) -> list[str]:
    return [f"{name}.{key}: unknown key; {suggestion(key, known)}" for key in section if key not in known]


def _find_auto(value: Any, location: str = "") -> list[str]:
    """Find "auto" values, which only Hugging Face's Trainer fills in; DeepSpeed drops some and chokes on others."""
    if isinstance(value, dict):
        return [found for key, child in value.items() for found in _find_auto(child, f"{location}.{key}".lstrip("."))]
    # the one place where DeepSpeed itself gives "auto" a meaning
    if value == "auto" and location != "data_types.keep_in_fp32_modules":
        return [f'{location}="auto" has nobody to fill it in; write the value, or remove the key']
    return []


def _check_batch_sizes(tree: dict[str, Any]) -> list[str]:
    return [
        f"{key}={tree[key]!r} must be a positive integer"
        for key in BATCH_KEYS
        if key in tree and not is_count(tree[key]) and tree[key] != "auto"
    ]


def _check_precision(tree: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("bf16", "bfloat16", "fp16"):
        section = tree.get(name, {})
        enabled = section.get("enabled", False) if isinstance(section, dict) else False
        if not isinstance(enabled, bool) and enabled != "auto":
            problems.append(f"{name}.enabled={enabled!r} must be true or false")
    if "bf16" in tree and "bfloat16" in tree:
        problems.append("bf16 and bfloat16 are the same section; keep bf16")
    if _enabled(tree, "fp16") and (_enabled(tree, "bf16") or _enabled(tree, "bfloat16")):
        problems.append("fp16.enabled and bf16.enabled are both true; keep bf16, whose range needs no loss scaling")
    for (name, option), reason in REFUSED_OPTIONS.items():
        for section in {name, "bfloat16" if name == "bf16" else name}:
            if isinstance(tree.get(section), dict) and tree[section].get(option, False) not in (False, "auto"):
                problems.append(f"{section}.{option}={tree[section][option]!r} {reason}")
    data_types = tree.get("data_types", {})
    if not isinstance(data_types, dict):
        return problems
    accumulation = data_types.get("grad_accum_dtype")
    precision = _precision(tree)
    if accumulation is not None and accumulation not in DTYPES:
        problems.append(f"data_types.grad_accum_dtype={accumulation!r} must be one of {', '.join(DTYPES)}")
    elif accumulation not in (None, "fp32", precision):
        problems.append(
            f"data_types.grad_accum_dtype={accumulation!r} does not go with {precision} weights; use "
            f"{' or '.join(dict.fromkeys(('fp32', precision)))}"
        )
    if data_types.get("param_dtype") not in (None, precision):
        problems.append(
            f"data_types.param_dtype={data_types['param_dtype']!r} contradicts the precision {precision}; remove it "
            "and set bf16.enabled"
        )
    return problems


def _check_communication(tree: dict[str, Any]) -> list[str]:
    """Check the types that gradients are sent in; DeepSpeed takes their names in capitals too."""
    return [
        f"{key}={tree[key]!r} must be one of {', '.join(DTYPES)}; write one of them, or remove it"
        for key in COMMUNICATION_KEYS
        if tree.get(key) not in (None, "auto") and str(tree[key]).lower() not in DTYPES
    ]


def _check_loss_scale(tree: dict[str, Any]) -> list[str]:
    """Check fp16's section: the numbers of its loss scaling."""
    section = tree.get("fp16", {})
    if not isinstance(section, dict):
        return []
    problems = []
    for key, (lowest, highest) in FP16_RANGES.items():
        value = section.get(key, lowest)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (whole and value >= lowest and (highest is None or value <= highest)):
            limits = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
            problems.append(f"fp16.{key}={value!r} must be a whole number {limits}")
    scale = section.get("loss_scale", 0)
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale != "auto" and not (is_number and 0 <= scale < float("inf")):
        problems.append(f"fp16.loss_scale={scale!r} must be a number of at least 0 (0 finds the scale by itself)")
    return problems


def _check_gradients(tree: dict[str, Any]) -> list[str]:
    """Check ZeRO's stage and what changes the size of gradients."""
    problems = []
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage != "auto" and (not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(4)):
        problems.append(f"zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    if isinstance(zero, dict) and zero.get("compute_grad_norm", True) is not True:
        problems.append("zero_optimization.compute_grad_norm must be true: the norm is reported and clipped by")
    clipping = tree.get("gradient_clipping", DEFAULT_GRADIENT_CLIPPING)
    is_number = isinstance(clipping, (int, float)) and not isinstance(clipping, bool)
    if clipping != "auto" and not (is_number and 0 <= clipping < float("inf")):
        problems.append(f"gradient_clipping={clipping!r} must be a number of at least 0 (0 turns it off)")
    if tree.get("gradient_allreduce_op", "mean") not in ("mean", "auto"):
        problems.append(
            f"gradient_allreduce_op={tree['gradient_allreduce_op']!r} would make the size of gradients depend on the "
            'number of ranks; use "mean"'
        )
    if tree.get("managed_gradient_accumulation", True) not in (True, "auto"):
        problems.append("managed_gradient_accumulation must be true: steps end where gradient accumulation ends")
    return problems


def _communicated(tree: dict[str, Any]) -> Precision:
    given = tree.get("communication_data_type")
    return _precision(tree) if given is None else given.lower()


def _enabled(tree: dict[str, Any], name: str) -> bool:
    section = tree.get(name, {})
    return isinstance(section, dict) and section.get("enabled", False) is True


def _precision(tree: dict[str, Any]) -> Precision:
    if _enabled(tree, "bf16") or _enabled(tree, "bfloat16"):
        return "bf16"
    return "fp16" if _enabled(tree, "fp16") else "fp32"
