"""Runs of laptop size with the same kinds of layers and the same kinds of neighbours as a large one; no torch here."""

import copy
from dataclasses import dataclass
from typing import Any

from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.deepspeed_config import Precision
from megagpt.plan.layout import uniform_counts
from megagpt.plan.zero import QUANTIZED
from megagpt.verify.neighbours import Sizes, sizes_of, small_sizes

MAX_RANKS = 8
HEAD, SEQUENCE, VOCABULARY = 16, 32, 122
LAYERS_PER_STAGE = 2
SMALL_PARAMETERS, SMALL_LENGTH = 8_000_000, 128
"""Runs up to this size are verified on their own layout, if its ranks are not too many."""
# Sizes above which ZeRO 3 cuts and releases parameters: none of a tiny model reaches DeepSpeed's defaults.
CUT_EVERYTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


@dataclass(frozen=True)
class SmallRun:
    """What is verified in place of a large run, or of a part of its neighbours."""

    exact: Plan
    """The layout in fp32 with SGD and clipping: Adam hides wrong scales of gradients, and 16 bit small errors."""
    configured: Plan
    """The layout in the precision and with the optimizer of the run."""
    changes: tuple[str, ...]
    """What differs from the run, one sentence each."""


@dataclass(frozen=True)
class SmallRuns:
    """Small runs that together have what a large one has."""

    runs: tuple[SmallRun, ...]
    left_out: tuple[str, ...]
    """Kinds of neighbours, and pairs of them, that no run of so few ranks can have."""


def shrink(plan: Plan, steps: int = 20, max_ranks: int = MAX_RANKS) -> SmallRuns:
    """Shrink a run to at most `max_ranks` ranks; to several such runs where one cannot have all kinds of neighbours.

    Each kind of parallelism, and each pair of them, is in one of the runs, and so are a pipeline stage between two
    others, copies of experts, key/value heads that ranks share, and weights cut twice (`neighbours.py`). The family's
    features stay: ratio of query heads to groups, heads that are not as wide together as the hidden size, biases,
    norms, activation, positions, windows, tying, experts, and which stages hold layers without them; a run that is
    small already stays as it is. Dropout goes: its random numbers depend on the layout.

    Args:
        plan: the run.
        steps: updates to compare.
        max_ranks: processes that may be started for one run.

    Raises:
        ConfigError: `max_ranks` is 1, and the run has more.
    """
    own = sizes_of(plan)
    if is_small(plan) and plan.world_size <= max_ranks:
        return SmallRuns((_small_run(plan, own, steps, shrinks_model=False),), ())
    layouts, left_out = small_sizes(own, max_ranks)
    return SmallRuns(tuple(_small_run(plan, sizes, steps) for sizes in layouts), tuple(left_out))


def _small_run(plan: Plan, sizes: Sizes, steps: int, shrinks_model: bool = True) -> SmallRun:
    tree = plan.run.model_dump(mode="json")
    length = plan.seq_length
    if shrinks_model:
        counts = small_counts(plan, sizes.pipeline)
        tree["parallel"] = small_parallel(plan, tree["parallel"], sizes, counts)
        tree["model"] = small_model(plan, tree["model"], sizes, counts)
        length = tree["model"]["max_position_embeddings"]
    tree["model"] |= {"preset": None, "init_from": None, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    if tree["model"]["num_experts"] is None:  # keys of experts are refused without experts, even with their defaults
        tree["model"] = {key: value for key, value in tree["model"].items() if not key.startswith("moe_")}
    tree["training"] |= {"steps": steps, "seq_length": length, "eval_interval": 0}
    if sizes.tensor == 1:
        tree["training"]["distribute_saved_activations"] = False
    for name in ("checkpoint", "logging"):
        tree.pop(name)
    tree["data"] = plan.run.data.sample_options
    raw = small_deepspeed(plan, sizes)

    def variant(optimizer: dict[str, Any], raw: dict[str, Any]) -> Plan:
        base = {"warmup_steps": 0, "decay_steps": steps}
        small = {**tree, "optimizer": {**plan.run.optimizer.model_dump(mode="json"), **base, **optimizer}}
        return make_plan(run_config_from_dict(small), deepspeed_config_from_dict(raw, "DeepSpeed config"), sizes.ranks)

    rate = 0.5 if plan.run.optimizer.name == "sgd" else 1e-3
    exact = {key: value for key, value in raw.items() if key not in ("bf16", "bfloat16", "fp16", "data_types")}
    configured = variant({"lr": rate, "min_lr": rate}, raw)
    return SmallRun(
        exact=variant(
            {"name": "sgd", "lr": 0.5, "min_lr": 0.5, "weight_decay": 0.0}, {**exact, "gradient_clipping": 0.5}
        ),
        configured=configured,
        changes=tuple(_changes(plan, configured)),
    )


def is_small(plan: Plan) -> bool:
    """Whether a laptop trains the model as it is."""
    return plan.num_parameters <= SMALL_PARAMETERS and plan.seq_length <= SMALL_LENGTH


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


def small_stages(plan: Plan, stages: int) -> list[range]:
    """The transformer layers, of the large run, that each stage of the small run stands for."""
    if stages == 1:
        return [range(plan.model.num_layers)]
    last = plan.pipeline_parallel_size - 1
    chosen = (0, last) if stages == 2 else (0, (last + 1) // 2, last)
    return [plan.transformer_layers_of_stage(stage) for stage in chosen]


def small_counts(plan: Plan, stages: int) -> list[int]:
    """Transformer layers of each stage of the small run: 2 or, where the large run's stages differ, up to 3."""
    if stages == 1:
        return [LAYERS_PER_STAGE]
    if isinstance(plan.run.parallel.pipeline_partition, str):
        odd = 1 if plan.model.num_layers % plan.pipeline_parallel_size else 0
        return uniform_counts(LAYERS_PER_STAGE * stages + odd, stages)
    counts = [len(layers) for layers in small_stages(plan, stages)]
    least = min(count for count in counts if count)
    return [count and LAYERS_PER_STAGE + (count > least) for count in counts]


def small_parallel(plan: Plan, parallel: dict[str, Any], sizes: Sizes, counts: list[int]) -> dict[str, Any]:
    """The parallel section of the small run.

    Args:
        plan: the run.
        parallel: its section.
        sizes: of the small run.
        counts: transformer layers of its stages.
    """
    by_list = not isinstance(plan.run.parallel.pipeline_partition, str)
    return parallel | {
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "context_parallel_size": sizes.context,
        "expert_model_parallel_size": sizes.expert,
        "sequence_parallel": plan.run.parallel.sequence_parallel and sizes.tensor > 1,
        "pipeline_partition": counts if by_list else plan.run.parallel.pipeline_partition,
    }


def small_heads(plan: Plan, sizes: Sizes) -> tuple[int, int]:
    """Query heads and key/value heads of the small run; both can be split as in the large one, and their ratio stays
    up to 4 (2, where there are many)."""
    full, tensor, context = plan.model, sizes.tensor, sizes.context
    ratio = full.num_attention_heads // full.num_query_groups
    if full.num_query_groups < plan.tensor_parallel_size:  # shared by ranks
        groups = sizes.groups
    else:
        each = full.num_query_groups // plan.tensor_parallel_size
        groups = tensor * (context if each % plan.context_parallel_size == 0 else 1)
        if ratio == 1 and groups == tensor:
            groups *= 2
    smallest = min(ratio, 4 if groups <= 2 else 2)
    ratio = next(n for n in range(smallest, smallest * tensor * context + 1) if groups * n % (tensor * context) == 0)
    return groups * ratio, groups


def small_model(plan: Plan, model: dict[str, Any], sizes: Sizes, counts: list[int]) -> dict[str, Any]:
    """The model section of the small run.

    Args:
        plan: the run.
        model: its section.
        sizes: of the small run.
        counts: transformer layers of its stages.
    """
    full, tensor = plan.model, sizes.tensor
    heads, groups = small_heads(plan, sizes)
    hidden = heads * HEAD
    if full.num_attention_heads * full.kv_channels != full.hidden_size:
        hidden += HEAD * tensor  # heads and hidden size stay apart
    small = {
        **model,
        "num_layers": sum(counts),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": HEAD,
        "ffn_hidden_size": 2 * tensor * max(1, round(hidden * full.ffn_hidden_size / full.hidden_size / 2 / tensor)),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
    }
    if small.get("sliding_window") is not None:
        small["sliding_window"] = SEQUENCE // 4
    if (skips := full.window_attn_skip_freq) is not None and skips <= full.num_layers:
        small["window_attn_skip_freq"] = 2  # each stage has a layer with a window and one without
    return small if small["num_experts"] is None else small | _small_experts(plan, model, sizes, counts)


def _small_experts(plan: Plan, model: dict[str, Any], sizes: Sizes, counts: list[int]) -> dict[str, Any]:
    """What a small model says about experts."""
    small: dict[str, Any] = {"num_experts": 4, "moe_router_topk": min(model["moe_router_topk"], 2)}
    for key in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if model.get(key) is not None:
            small[key] = 16 * sizes.tensor
    if plan.model.moe_layer_freq != 1:
        pattern: list[int] = []
        for layers, count in zip(small_stages(plan, sizes.pipeline), counts, strict=True):
            pattern += _kinds([int(plan.model.has_experts(layer)) for layer in layers], count)
        small["moe_layer_freq"] = pattern
    return small


def _kinds(kinds: list[int], count: int) -> list[int]:
    """So many of some layers' kinds: each one at first, in their order."""
    order = list(dict.fromkeys(kinds))
    return [order[min(index, len(order) - 1)] for index in range(count)]


def small_deepspeed(plan: Plan, sizes: Sizes) -> dict[str, Any]:
    """The DeepSpeed JSON of the small run."""
    raw = copy.deepcopy(plan.deepspeed.raw)
    microbatch = 2  # fewer tokens learn too little to compare
    microbatches = min(plan.num_microbatches, max(2, sizes.pipeline + 1))
    raw |= {
        "train_batch_size": microbatch * microbatches * sizes.data,
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": microbatches,
    }
    _leave_out_hardware(raw)
    if plan.zero_stage == 3:
        raw["zero_optimization"] = {**raw["zero_optimization"], **CUT_EVERYTHING}
        if "zero_hpz_partition_size" in raw["zero_optimization"]:
            raw["zero_optimization"]["zero_hpz_partition_size"] = sizes.secondary
    if plan.precision == "fp16" and not raw["fp16"].get("loss_scale"):
        raw["fp16"]["initial_scale_power"] = min(raw["fp16"].get("initial_scale_power", 16), 8)  # no skipped steps
    return raw


def _leave_out_hardware(raw: dict[str, Any]) -> None:
    """What takes a cluster's devices: quantized collectives, which round anyway, and disks, which keep what memory
    keeps."""
    zero = raw.get("zero_optimization", {})
    for key in QUANTIZED:
        zero.pop(key, None)
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        zero["offload_optimizer"] = {"device": "cpu"}
        raw.pop("aio", None)


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
        groups = f"{section.num_query_groups} group{'s'[: section.num_query_groups - 1]}"
        return (
            f"{section.num_layers} layers, hidden {section.hidden_size}, {section.num_attention_heads} heads of "
            f"{section.kv_channels} in {groups}, MLP {section.ffn_hidden_size}"
        )

    def batch(plan: Plan) -> str:
        return f"{plan.num_microbatches} micro-batches of {plan.microbatch_size} x {plan.seq_length} tokens"

    lines = [f"{text(full)} -> {text(small)}" for text in (sizes, model, batch) if text(full) != text(small)]
    if full.model.hidden_dropout or full.model.attention_dropout:
        lines.append("dropout -> none (its random numbers depend on the layout)")
    if full.deepspeed.is_quantized:
        lines.append("quantized collectives -> exact ones (they take CUDA kernels, and round)")
    if full.deepspeed.optimizer_is_on_disk:
        lines.append("optimizer on a disk -> in host memory (with the same numbers)")
    return lines or ["the run as it is"]
