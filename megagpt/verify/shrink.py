"""A run of laptop size with the same kinds of layers and the same kinds of neighbours as a large one; no torch here."""

import copy
import math
from dataclasses import dataclass
from typing import Any

from megagpt.errors import ConfigError
from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.deepspeed_config import Precision

MAX_RANKS = 8
HEAD, SEQUENCE, VOCABULARY = 16, 32, 122
LAYERS_PER_STAGE = 2
# Sizes above which ZeRO 3 cuts and releases parameters: none of a tiny model reaches DeepSpeed's defaults.
CUT_EVERYTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


@dataclass(frozen=True)
class SmallRun:
    """What is verified in place of a large run."""

    exact: Plan
    """The layout in fp32 with SGD and clipping: Adam hides wrong scales of gradients, and 16 bit small errors."""
    configured: Plan
    """The layout in the precision and with the optimizer of the run."""
    changes: tuple[str, ...]
    """What differs from the run, one sentence each."""


def shrink(plan: Plan, steps: int = 20, max_ranks: int = MAX_RANKS) -> SmallRun:
    """Shrink a run to at most `max_ranks` ranks.

    Each parallel size above 1 stays above 1; three or more pipeline stages stay three if there are ranks enough (a
    stage between two others works differently). The family's features stay: ratio of query heads to groups, heads that
    are not as wide together as the hidden size, biases, norms, activation, positions, tying, experts. Dropout goes: its
    random numbers depend on the layout.

    Args:
        plan: the run.
        steps: updates to compare.
        max_ranks: processes that may be started.

    Raises:
        ConfigError: the layout needs more ranks than `max_ranks` even at its smallest.
    """
    parallel = small_parallel(plan, max_ranks)
    tree = plan.run.model_dump(mode="json")
    tree["parallel"] |= {key: value for key, value in parallel.items() if key != "data"}
    tree["model"] = small_model(plan, tree["model"], parallel)
    length = tree["model"]["max_position_embeddings"]
    world_size = parallel["data"] * math.prod(value for key, value in parallel.items() if key in WORLD_SIZES)
    tree["training"] |= {"steps": steps, "seq_length": length, "eval_interval": 0}
    for name in ("checkpoint", "logging"):
        tree.pop(name)
    tree["data"] = plan.run.data.sample_options
    raw = small_deepspeed(plan, parallel)

    def variant(optimizer: dict[str, Any], raw: dict[str, Any]) -> Plan:
        base = {"warmup_steps": 0, "decay_steps": steps}
        small = {**tree, "optimizer": {**plan.run.optimizer.model_dump(mode="json"), **base, **optimizer}}
        return make_plan(run_config_from_dict(small), deepspeed_config_from_dict(raw, "DeepSpeed config"), world_size)

    rate = 0.5 if plan.run.optimizer.name == "sgd" else 1e-3
    exact = {key: value for key, value in raw.items() if key not in ("bf16", "bfloat16", "fp16", "data_types")}
    small = SmallRun(
        exact=variant(
            {"name": "sgd", "lr": 0.5, "min_lr": 0.5, "weight_decay": 0.0}, {**exact, "gradient_clipping": 0.5}
        ),
        configured=variant({"lr": rate, "min_lr": rate}, raw),
        changes=(),
    )
    return SmallRun(small.exact, small.configured, tuple(_changes(plan, small.configured)))


def single_plan(plan: Plan, precision: Precision = "fp32", microbatch_size: int | None = None) -> Plan:
    """The same model, samples and updates for one rank.

    Args:
        plan: any layout.
        precision: of the forward and backward passes.
        microbatch_size: another one than the plan's, which divides the global batch.
    """
    tree = plan.run.model_dump(mode="json")
    for key, value in tree["parallel"].items():
        if key.endswith("_parallel_size"):
            tree["parallel"][key] = 1
        elif key == "sequence_parallel":
            tree["parallel"][key] = False
        elif isinstance(value, list):
            tree["parallel"][key] = "uniform"
    tree["training"] |= {"recompute_granularity": "none", "recompute_method": "uniform", "recompute_num_layers": 1}
    tree["training"] |= {"distribute_saved_activations": False, "offload_saved_activations": False}
    raw: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": microbatch_size or plan.microbatch_size,
        "gradient_clipping": plan.gradient_clipping,
    }
    if precision != "fp32":
        section = plan.deepspeed.raw.get(precision, {}) if precision == "fp16" else {}
        raw[precision] = {**section, "enabled": True}
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 1)


# Sizes whose product with the data-parallel size is the number of ranks.
WORLD_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def small_parallel(plan: Plan, max_ranks: int) -> dict[str, int]:
    """The parallel sizes of the small run: every `*_parallel_size` of the run config, and `data`."""
    full = plan.run.parallel.model_dump()
    sizes = {key: min(value, 2) for key, value in full.items() if key.endswith("_parallel_size")}
    fixed = math.prod(value for key, value in sizes.items() if key in WORLD_SIZES)
    data = min(plan.data_parallel_size, 2)
    if fixed * data > max_ranks and sizes.get("expert_model_parallel_size", 1) == 1:
        data = 1
    if fixed * data > max_ranks:
        raise ConfigError(
            f"the layout has {fixed * data} ranks at its smallest, more than --max-ranks={max_ranks}; allow that many, "
            "or verify its parts one by one (key=value overrides)"
        )
    if full["pipeline_model_parallel_size"] > 2 and fixed // 2 * 3 * data <= max_ranks:
        sizes["pipeline_model_parallel_size"] = 3
    return {**sizes, "data": data}


def small_model(plan: Plan, model: dict[str, Any], parallel: dict[str, int]) -> dict[str, Any]:
    """The model section of the small run."""
    full, tensor = plan.model, parallel["tensor_model_parallel_size"]
    stages = parallel["pipeline_model_parallel_size"]
    ratio = full.num_attention_heads // full.num_query_groups
    groups = tensor if full.num_query_groups <= tensor or ratio > 1 else 2 * tensor
    heads = groups * min(ratio, 4)
    odd = 1 if full.num_layers % plan.pipeline_parallel_size else 0
    hidden = heads * HEAD
    if full.num_attention_heads * full.kv_channels != full.hidden_size:
        hidden += HEAD * tensor  # heads and hidden size stay apart
    small = {
        **model,
        "preset": None,
        "init_from": None,
        "num_layers": LAYERS_PER_STAGE * stages + odd,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": HEAD,
        "ffn_hidden_size": 2 * tensor * max(1, round(hidden * full.ffn_hidden_size / full.hidden_size / 2 / tensor)),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if small.get("sliding_window") is not None:
        small["sliding_window"] = SEQUENCE // 4
    if small.get("num_experts") is None:  # keys of experts are refused without experts, even with their defaults
        return {key: value for key, value in small.items() if not key.startswith("moe_")}
    small["num_experts"] = 4
    small["moe_router_topk"] = min(model["moe_router_topk"], 2)
    for key in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if small.get(key) is not None:
            small[key] = 16 * tensor
    return small


def small_deepspeed(plan: Plan, parallel: dict[str, int]) -> dict[str, Any]:
    """The DeepSpeed JSON of the small run."""
    raw = copy.deepcopy(plan.deepspeed.raw)
    stages = parallel["pipeline_model_parallel_size"]
    microbatch = 2  # fewer tokens learn too little to compare
    microbatches = min(plan.num_microbatches, max(2, stages + 1))
    raw |= {
        "train_batch_size": microbatch * microbatches * parallel["data"],
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": microbatches,
    }
    if plan.zero_stage == 3:
        raw["zero_optimization"] = {**raw["zero_optimization"], **CUT_EVERYTHING}
    if plan.precision == "fp16" and not raw["fp16"].get("loss_scale"):
        raw["fp16"]["initial_scale_power"] = min(raw["fp16"].get("initial_scale_power", 16), 8)  # no skipped steps
    return raw


def _changes(full: Plan, small: Plan) -> list[str]:
    """What was made smaller, in words."""

    def sizes(plan: Plan) -> str:
        known = plan.run.parallel.model_dump()
        more = [
            f"{key.removesuffix('_parallel_size').removesuffix('_model')} {value}"
            for key, value in known.items()
            if key.endswith("_parallel_size") and not key.startswith(("tensor", "pipeline")) and value > 1
        ]
        parts = [f"TP {plan.tensor_parallel_size}", f"PP {plan.pipeline_parallel_size}", *more]
        return f"{plan.world_size} ranks = {' x '.join([*parts, f'DP {plan.data_parallel_size}'])}"

    def model(plan: Plan) -> str:
        section = plan.model
        return (
            f"{section.num_layers} layers, hidden {section.hidden_size}, {section.num_attention_heads} heads of "
            f"{section.kv_channels} in {section.num_query_groups} groups, MLP {section.ffn_hidden_size}"
        )

    def batch(plan: Plan) -> str:
        return f"{plan.num_microbatches} micro-batches of {plan.microbatch_size} x {plan.seq_length} tokens"

    lines = [f"{text(full)} -> {text(small)}" for text in (sizes, model, batch) if text(full) != text(small)]
    if full.model.hidden_dropout or full.model.attention_dropout:
        lines.append("dropout -> none (its random numbers depend on the layout)")
    if full.data_parallel_size > 1 == small.data_parallel_size:
        lines.append("data parallelism is left out; verify it with a smaller tensor or pipeline size")
    return lines
