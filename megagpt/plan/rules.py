"""Rules that span sections or files. Each function returns one sentence per broken rule, with the fix."""

import math
from collections.abc import Iterator

from megagpt.errors import ConfigError
from megagpt.plan.batch import resolve_batch
from megagpt.plan.config import ModelConfig, RunConfig
from megagpt.plan.data_rules import check_data
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.expert_rules import check_experts, check_stages_of_experts
from megagpt.plan.layout import divisors
from megagpt.plan.recompute import FULL_ONLY_KEYS
from megagpt.plan.wording import or_list, shown
from megagpt.plan.zero import check_zero
from megagpt.storage import RemotePath, location
from megagpt.storage.filesystem import problem_of


def check_all(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> list[str]:
    """Check every rule.

    Args:
        world_size: number of ranks.
    """
    return list(broken_rules(run, deepspeed, world_size))


def broken_rules(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> Iterator[str]:
    """What `check_all` finds, one problem after the other: who needs only the first one need not wait for all."""
    yield from check_ranks(run, world_size)
    yield from check_model(run.model)
    yield from check_tensor_parallel(run)
    yield from check_context_parallel(run)
    yield from check_experts(run, deepspeed, world_size)
    yield from check_pipeline(run, deepspeed)
    yield from check_sequence(run)
    yield from check_recompute(run)
    yield from check_flash_attention(run)
    yield from check_schedule(run)
    yield from check_data(run)
    yield from check_outputs(run)
    yield from check_deepspeed(run, deepspeed)
    yield from check_zero(run, deepspeed, world_size)
    yield from check_batch(run, deepspeed, world_size)


def check_ranks(run: RunConfig, world_size: int) -> list[str]:
    """The number of ranks must be TP x CP x PP x DP."""
    parallel = run.parallel
    sizes = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    if parallel.context_parallel_size > 1:
        sizes["context_parallel_size"] = parallel.context_parallel_size
    unit = parallel.ranks_per_replica
    if world_size >= 1 and world_size % unit == 0:
        return []
    below = world_size // unit * unit
    works = or_list(size for size in (below, below + unit) if size > 0)
    return [
        f"world size {world_size} is not a multiple of {' x '.join(sizes)} = {' x '.join(map(str, sizes.values()))} = "
        f"{unit}; start {works} ranks, or change the layout"
    ]


def check_batch(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> list[str]:
    """The batch must go around the data-parallel ranks."""
    unit = run.parallel.ranks_per_replica
    if world_size < unit or world_size % unit:
        return []  # how many data-parallel ranks there are is unknown, which is reported
    try:
        resolve_batch(deepspeed, world_size // unit)
    except ConfigError as error:
        return error.problems
    return []


def check_model(model: ModelConfig) -> list[str]:
    """Sizes of the model that must fit each other."""
    problems = []
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        problems.append(
            f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}; use "
            f"num_query_groups {or_list(divisors(heads))}"
        )
    rotated = int(model.kv_channels * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated % 2 or rotated == 0):
        problems.append(
            f"model.kv_channels={model.kv_channels} x model.rotary_percent={model.rotary_percent} gives {rotated} "
            "rotated channels, but they are rotated in pairs; choose values whose product is even and not 0"
        )
    if model.parallel_residual and model.post_layernorms:
        problems.append(
            "model.post_layernorms=true does not go with model.parallel_residual=true (no such layer is built); set one"
            " of them to false"
        )
    if model.sliding_window is None:
        problems += [
            f"model.{key}={value} is about layers with a window, but model.sliding_window is not set; set it, or remove"
            f" {key}"
            for key in ("window_attn_skip_freq", "rotary_base_local")
            if (value := getattr(model, key)) is not None
        ]
    return [*problems, *_check_rotary_scaling(model)]


def _check_rotary_scaling(model: ModelConfig) -> list[str]:
    scaling = model.rotary_scaling
    if scaling is None:
        return []
    if model.position_embedding_type != "rope":
        return [
            f"model.rotary_scaling stretches rotary frequencies, but model.position_embedding_type="
            f"{model.position_embedding_type}; remove rotary_scaling, or use rope"
        ]
    if scaling.type == "linear":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return [
            f"model.rotary_scaling.{name}={getattr(scaling, name)} does not go with type=linear; remove it, or use "
            "type: llama3"
            for name in names
            if getattr(scaling, name) is not None
        ]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        return [
            f"model.rotary_scaling.low_freq_factor={low:g} must be less than high_freq_factor={high:g}; Llama 3.1 has "
            "1 and 4"
        ]
    return []


def check_tensor_parallel(run: RunConfig) -> list[str]:
    """What is split over tensor-parallel ranks must divide."""
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    works = [size for size in divisors(math.gcd(model.num_attention_heads, model.ffn_hidden_size))
             if _groups_split(model, size)]  # fmt: skip
    use = f"parallel.tensor_model_parallel_size={tensor}; use {or_list(works)}"
    problems = []
    for key in ("num_attention_heads", "ffn_hidden_size"):
        value = getattr(model, key)
        if value % tensor:
            problems.append(f"model.{key}={value} is not divisible by {use}")
    if model.num_attention_heads % tensor == 0 and not _groups_split(model, tensor):
        problems.append(
            f"model.num_query_groups={model.num_query_groups} (of {model.kv_channels} channels) cannot be spread "
            f"evenly over, nor shared evenly by, the ranks of {use}"
        )
    if run.parallel.sequence_parallel and tensor == 1:
        problems.append(
            "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size=1; set sequence_parallel to false, or tensor_model_parallel_size "
            "above 1"
        )
    return problems


def _groups_split(model: ModelConfig, tensor: int) -> bool:
    """Whether key/value heads go around: some whole ones for each rank, or each one for several whole ranks.

    In the second case the projection's rows are cut evenly all the same, and its results gathered, so that their number
    must divide too (Megatron-Core, `SelfAttention.get_query_key_value_tensors`).
    """
    groups = model.num_query_groups
    rows = (model.num_attention_heads + 2 * groups) * model.kv_channels
    return groups % tensor == 0 or (tensor % groups == 0 and rows % tensor == 0)


def check_context_parallel(run: RunConfig) -> list[str]:
    """Inside attention each context-parallel rank holds an equal part of its tensor-parallel rank's query heads."""
    tensor, context = run.parallel.tensor_model_parallel_size, run.parallel.context_parallel_size
    heads, rest = divmod(run.model.num_attention_heads, tensor)
    if rest or heads % context == 0:
        return []
    works = max(size for size in divisors(heads) if size < context)
    return [
        f"parallel.context_parallel_size={context} does not divide model.num_attention_heads / "
        f"parallel.tensor_model_parallel_size = {run.model.num_attention_heads} / {tensor} = {heads}; use "
        f"context_parallel_size {works}, or fewer tensor-parallel ranks"
    ]


def check_pipeline(run: RunConfig, deepspeed: DeepSpeedConfig) -> list[str]:
    """Every stage needs a layer, and experts if they are spread; ZeRO 2 and 3 do not go with stages."""
    stages = run.parallel.pipeline_model_parallel_size
    problems = check_pipeline_partition(run) or check_stages_of_experts(run)
    if stages > 1 and deepspeed.zero_stage >= 2:
        problems.append(
            f"{deepspeed.source}: zero_optimization.stage={deepspeed.zero_stage} does not go with "
            f"parallel.pipeline_model_parallel_size={stages} (DeepSpeed's pipeline engine refuses it); "
            "use stage 1, or pipeline_model_parallel_size=1"
        )
    return problems


def check_pipeline_partition(run: RunConfig) -> list[str]:
    """The transformer layers must go around.

    Only the last stage can do without one: DeepSpeed reduces the gradient norm once per parameter group, so that every
    stage needs matrices as well as norms or biases, and would wait for a stage that has the embedding alone for ever.
    """
    layers, stages = run.model.num_layers, run.parallel.pipeline_model_parallel_size
    partition = run.parallel.pipeline_partition
    if isinstance(partition, str):
        most = layers if partition == "uniform" else layers + 1
        if stages <= most:
            return []
        few = "" if partition == "uniform" else " - 1 (the last may hold the head alone)"
        return [
            f"model.num_layers={layers} is less than parallel.pipeline_model_parallel_size={stages}{few}; use at most "
            f"{most} stages"
        ]
    key = f"parallel.pipeline_partition={list(partition)}"
    problems = []
    if len(partition) != stages:
        problems.append(
            f"{key} has {len(partition)} numbers, but parallel.pipeline_model_parallel_size={stages}; write one number "
            "per stage"
        )
    if sum(partition) != layers:
        problems.append(
            f"{key} adds up to {sum(partition)}, but model.num_layers={layers}; change the numbers so that they add up "
            f"to {layers}"
        )
    if 0 in partition[:-1]:
        problems.append(
            f"{key} leaves stage {partition.index(0)} without a layer; only the last stage, which has the head, may "
            "hold no transformer layer"
        )
    return problems


def check_sequence(run: RunConfig) -> list[str]:
    """The length of samples must fit positions, and be divisible into the parts that ranks hold."""
    problems = []
    length, longest = run.training.seq_length, run.model.max_position_embeddings
    tensor = run.parallel.tensor_model_parallel_size
    if length > longest:
        problems.append(
            f"training.seq_length={length} is more than model.max_position_embeddings={longest}; shorten the samples, "
            "or raise max_position_embeddings"
        )
    parts = {}
    if run.parallel.context_parallel_size > 1:
        parts["parallel.context_parallel_size"] = run.parallel.context_parallel_size
    if run.parallel.sequence_parallel:
        parts["parallel.tensor_model_parallel_size (parallel.sequence_parallel=true)"] = tensor
    unit = math.prod(parts.values())
    if length % unit:
        below = length // unit * unit
        product = f" = {' x '.join(map(str, parts.values()))}" if len(parts) > 1 else ""
        problems.append(
            f"training.seq_length={length} is not divisible by {' x '.join(parts)}{product} = {unit}; use "
            f"{or_list(x for x in (below, below + unit) if x > 0)}"
        )
    return problems


def check_flash_attention(run: RunConfig) -> list[str]:
    """The newer kernels compute without dropout and bent scores, and add up in any order; in fp32 and on CPUs they are
    not asked for."""
    model, asked = run.model, run.training.flash_attention
    reasons = {
        f"model.attention_dropout={model.attention_dropout}": model.attention_dropout > 0,
        f"model.attn_logit_softcapping={model.attn_logit_softcapping}": model.attn_logit_softcapping is not None,
        "training.deterministic=true": run.training.deterministic,
    }
    if asked in ("auto", "torch"):
        return []
    return [
        f"training.flash_attention={asked} computes attention without dropout and soft caps, in any order, but "
        f"{reason}; set it to auto"
        for reason, is_so in reasons.items()
        if is_so
    ]


def check_recompute(run: RunConfig) -> list[str]:
    """What refines full recomputation needs it; splitting kept inputs over TP ranks needs TP ranks that hold copies."""
    problems = []
    training, tensor = run.training, run.parallel.tensor_model_parallel_size
    defaults = type(training).model_fields
    for key in FULL_ONLY_KEYS:
        value = getattr(training, key)
        if training.recompute_granularity != "full" and value != defaults[key].default:
            problems.append(
                f"training.{key}={shown(value)} refines full recomputation, but training.recompute_granularity="
                f"{training.recompute_granularity}; set that to full, or remove {key}"
            )
    if not training.distribute_saved_activations:
        return problems
    if tensor == 1 or run.parallel.sequence_parallel:
        reason = "there is one" if tensor == 1 else "parallel.sequence_parallel=true splits them already"
        problems.append(
            "training.distribute_saved_activations=true splits activations that tensor-parallel ranks hold copies of, "
            f"but {reason}; set it to false"
        )
    elif run.model.hidden_size % tensor:
        problems.append(
            f"training.distribute_saved_activations=true needs model.hidden_size={run.model.hidden_size} to be "
            f"divisible by parallel.tensor_model_parallel_size={tensor}; set it to false, or use "
            f"tensor_model_parallel_size {or_list(divisors(run.model.hidden_size))}"
        )
    return problems


def check_schedule(run: RunConfig) -> list[str]:
    """The learning rate warms up, then decays down to min_lr."""
    problems = []
    optimizer = run.optimizer
    if optimizer.min_lr > optimizer.lr:
        problems.append(
            f"optimizer.min_lr={optimizer.min_lr:g} is more than optimizer.lr={optimizer.lr:g}; use at most "
            f"{optimizer.lr:g} (a tenth of it is usual)"
        )
    if optimizer.warmup_steps >= optimizer.decay_steps:
        problems.append(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not less than optimizer.decay_steps="
            f"{optimizer.decay_steps} (default: training.steps); use at most {optimizer.decay_steps - 1}"
        )
    return problems


def check_outputs(run: RunConfig) -> list[str]:
    """Where checkpoints go."""
    problems = []
    if run.checkpoint.directory is None and run.checkpoint.save_interval > 0:
        problems.append(
            f"checkpoint.save_interval={run.checkpoint.save_interval} needs a place to save to; set "
            "checkpoint.directory, or save_interval to 0"
        )
    directory, logs = run.checkpoint.directory, run.logging.directory
    place = None if directory is None else location(directory)
    if isinstance(place, RemotePath) and (problem := problem_of(place.url)):
        problems.append(f"checkpoint.directory: {problem}")
    if logs is not None and isinstance(location(logs), RemotePath):
        problems.append(f"logging.directory={logs}: files cannot grow in an object store; give a local folder")
    return problems


def check_deepspeed(run: RunConfig, deepspeed: DeepSpeedConfig) -> list[str]:
    """What DeepSpeed could do, but megagpt does not support."""
    problems = []
    pipeline = deepspeed.raw.get("pipeline", {})
    if run.parallel.sequence_parallel:
        for key in ("pipe_partitioned", "grad_partitioned"):
            if pipeline.get(key):
                # DeepSpeed would take the activations' shards along the sequence for copies of each other
                problems.append(
                    f"{deepspeed.source}: pipeline.{key}=true does not go with parallel.sequence_parallel=true; "
                    "remove it"
                )
    return problems
