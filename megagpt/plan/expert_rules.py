"""Rules about experts. Each function returns one sentence per broken rule, with the fix; `rules.py` calls them."""

from megagpt.plan.config import ModelConfig, RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.layout import divisors, stage_bounds_of_run, transformer_layers_of_stage
from megagpt.plan.wording import or_list


def check_experts(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> list[str]:
    """Check everything about experts.

    Args:
        world_size: number of ranks.
    """
    if run.model.num_experts is None:
        return _check_dense(run)
    problems = [*_check_architecture(run.model), *_check_tensor_parallel(run), *_check_padding(run)]
    if run.parallel.expert_model_parallel_size > 1:
        problems += [*_check_expert_parallel(run, world_size), *_check_zero(run, deepspeed)]
    return problems


def _check_dense(run: RunConfig) -> list[str]:
    """Keys about experts say nothing in a model without them."""
    model = run.model
    written = [
        f"model.{key}={getattr(model, key)}"
        for key, field in ModelConfig.model_fields.items()
        if key.startswith("moe_") and key != "moe_ffn_hidden_size" and getattr(model, key) != field.default
    ]
    if model.moe_ffn_hidden_size != model.ffn_hidden_size:
        written.append(f"model.moe_ffn_hidden_size={model.moe_ffn_hidden_size}")
    ways = run.parallel.expert_model_parallel_size
    if ways > 1:
        written.append(f"parallel.expert_model_parallel_size={ways}")
    return [f"{key} needs experts; set model.num_experts, or remove this key" for key in written]


def _check_architecture(model: ModelConfig) -> list[str]:
    problems = []
    experts, chosen, pattern = model.num_experts, model.moe_router_topk, model.moe_layer_freq
    assert experts is not None
    if chosen > experts:
        problems.append(
            f"model.moe_router_topk={chosen} is more than model.num_experts={experts}; use at most {experts}"
        )
    if chosen == 1 and not model.moe_router_pre_softmax:
        problems.append(
            "model.moe_router_topk=1 gives the one chosen expert always the weight 1, from which the router cannot "
            "learn; set model.moe_router_pre_softmax=true, or moe_router_topk to 2 or more"
        )
    if isinstance(pattern, tuple) and len(pattern) != model.num_layers:
        problems.append(
            f"model.moe_layer_freq has {len(pattern)} entries, but model.num_layers={model.num_layers}; write one per "
            "layer, or one number n for every n-th layer"
        )
    elif isinstance(pattern, tuple) and not any(pattern):
        problems.append("model.moe_layer_freq gives no layer experts; write 1 for those that have some")
    if model.add_bias_linear:
        problems.append(
            "model.add_bias_linear=true does not go with model.num_experts: experts have no biases; set it to false "
            "(model.add_qkv_bias=true keeps those of queries, keys and values)"
        )
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        problems.append(
            "model.moe_shared_expert_gate=true needs a shared expert; set model.moe_shared_expert_intermediate_size, "
            "or the gate to false"
        )
    return problems


def _check_tensor_parallel(run: RunConfig) -> list[str]:
    problems = []
    tensor = run.parallel.tensor_model_parallel_size
    for key in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = getattr(run.model, key)
        if width is not None and width % tensor:
            problems.append(
                f"model.{key}={width} is not divisible by parallel.tensor_model_parallel_size={tensor}; use "
                f"{or_list(divisors(width))}"
            )
    if tensor > 1 and not run.parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor_model_parallel_size={tensor} with model.num_experts needs "
            "parallel.sequence_parallel=true, so that each rank routes its own tokens (Megatron-Core refuses it "
            "otherwise); set it to true"
        )
    return problems


def _check_padding(run: RunConfig) -> list[str]:
    """Megatron-Core takes the z-loss as the mean over each rank's own tokens, which are not as many where some pad."""
    splits = run.parallel.sequence_parallel or run.parallel.context_parallel_size > 1
    if run.model.moe_z_loss_coeff == 0 or run.data.packing == "stream" or not splits:
        return []
    return [
        f"model.moe_z_loss_coeff={run.model.moe_z_loss_coeff:g} with data.packing={run.data.packing} would depend on "
        "how sequence or context parallelism cuts the padding; use packing: stream with reset_attention_mask, set "
        "moe_z_loss_coeff to 0, or do without both kinds of parallelism"
    ]


def _check_expert_parallel(run: RunConfig, world_size: int) -> list[str]:
    problems = []
    model, parallel = run.model, run.parallel
    experts, ways = model.num_experts, parallel.expert_model_parallel_size
    assert experts is not None
    if experts % ways:
        problems.append(
            f"model.num_experts={experts} is not divisible by parallel.expert_model_parallel_size={ways}; use "
            f"{or_list(divisors(experts))}"
        )
    unit = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data = world_size // unit
    if data >= 1 and world_size % unit == 0 and data % ways:
        size = "data x context" if parallel.context_parallel_size > 1 else "data"
        problems.append(
            f"the {size}-parallel size {data} ({world_size} ranks / {unit}) is not divisible by "
            f"parallel.expert_model_parallel_size={ways}, as data-parallel ranks share the experts; use "
            f"{or_list(n for n in divisors(data) if experts % n == 0)}"
        )
    return problems


def check_stages_of_experts(run: RunConfig) -> list[str]:
    """Under expert parallelism every stage needs experts.

    Args:
        run: its layers go around the stages.
    """
    model, ways, pattern = run.model, run.parallel.expert_model_parallel_size, run.model.moe_layer_freq
    if ways == 1 or model.num_experts is None or (isinstance(pattern, tuple) and len(pattern) != model.num_layers):
        return []
    bounds = stage_bounds_of_run(run)
    for stage in range(len(bounds) - 1):
        if not any(model.has_experts(layer) for layer in transformer_layers_of_stage(bounds, stage)):
            return [
                f"pipeline stage {stage} has no layer with experts, but under "
                f"parallel.expert_model_parallel_size={ways} DeepSpeed adds up the experts' norms over the stages; "
                "use fewer stages, another model.moe_layer_freq or parallel.pipeline_partition, or "
                "expert_model_parallel_size=1"
            ]
    return []


def _check_zero(run: RunConfig, deepspeed: DeepSpeedConfig) -> list[str]:
    problems = []
    ways = f"parallel.expert_model_parallel_size={run.parallel.expert_model_parallel_size}"
    zero = deepspeed.raw.get("zero_optimization", {})
    if deepspeed.zero_stage == 3:
        problems.append(
            f"{deepspeed.source}: zero_optimization.stage=3 does not go with {ways} (DeepSpeed's stage 3 "
            "spreads only experts that its own AutoEP has built); use stage 1 or 2, or expert_model_parallel_size=1"
        )
    for key in ("reduce_scatter", "contiguous_gradients"):
        if zero.get(key) is False:
            problems.append(
                f"{deepspeed.source}: zero_optimization.{key}=false does not go with {ways}: DeepSpeed would sum the "
                "gradients of different experts; remove it"
            )
    return problems
