"""The Plan for people (`describe`) and for programs (`plan_as_dict`)."""

import dataclasses
from typing import Any

from megagpt.plan.experts import num_expert_layers
from megagpt.plan.plan import Plan
from megagpt.plan.traffic import traffic_per_step

GIB = 1 << 30
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "total")


def describe(plan: Plan) -> str:
    """Describe a plan in a page of text: model, layout, batch, precision, stages with memory, FLOPs and notes."""
    facts = [
        ("model", _model_lines(plan)),
        ("layout", _layout_lines(plan)),
        ("batch", _batch_lines(plan)),
        ("precision", _precision_lines(plan)),
        ("run", _run_lines(plan)),
    ]
    lines = []
    for title, texts in facts:
        lines += [f"{title if index == 0 else '':<11}{text}" for index, text in enumerate(texts)]
    lines += ["", *_memory_table(plan), *_traffic_table(plan)]
    if plan.notes:
        lines += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Everything in a plan as plain values that JSON can hold: sizes as integers, memory in bytes per rank."""
    plain = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("run", "deepspeed", "memory_per_stage", "stage_bounds", "notes")
    }
    return {
        **plain,
        "tokens_per_step": plan.tokens_per_step,
        "pipeline_bubble": plan.pipeline_bubble,
        "stage_bounds": list(plan.stage_bounds),
        "memory_per_stage": [
            {"stage": estimate.stage, **{part: getattr(estimate, part) for part in (*MEMORY_PARTS, "host", "disk")}}
            for estimate in plan.memory_per_stage
        ],
        "sent_per_stage": _sent_per_stage(plan),
        "notes": list(plan.notes),
        "run": plan.run.model_dump(mode="json"),
        "engine_config": plan.engine_config(),
    }


def stage_contents(plan: Plan, stage: int) -> str:
    """Name the pipeline layers of one stage, such as `embedding, layers 0-15`; layers count from 0."""
    layers = plan.transformer_layers_of_stage(stage)
    parts = ["embedding"] if stage == 0 else []
    if layers:
        parts.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}")
    if stage == plan.pipeline_parallel_size - 1:
        parts += ["final norm", "head"]
    return ", ".join(parts)


def short_count(number: float) -> str:
    """Round a count to three digits with a unit: 8.03 B, 250 M."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}" if number < 999.5 * scale else f"{number / scale:.0f}{unit}"
    return f"{number:g}"


def _model_lines(plan: Plan) -> list[str]:
    model = plan.model
    name = f"{model.preset}: " if model.preset else ""
    groups = model.num_query_groups
    sharing = f" sharing {groups} key/value heads" if groups != model.num_attention_heads else ""
    vocabulary = f"vocabulary {model.vocab_size:,}"
    if plan.padded_vocab_size != model.vocab_size:
        vocabulary += f" (padded to {plan.padded_vocab_size:,})"
    window = ""
    if model.sliding_window is not None:
        skips = model.window_attn_skip_freq
        window = f", sliding window {model.sliding_window}" + (f" (not in every {skips}th layer)" if skips else "")
    return [
        f"{name}{plan.num_parameters:,} parameters ({short_count(plan.num_parameters)})",
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads of "
        f"{model.kv_channels}{sharing}, MLP {model.ffn_hidden_size} ({model.activation}){window}, {vocabulary}",
        *_expert_lines(plan),
    ]


def _expert_lines(plan: Plan) -> list[str]:
    model = plan.model
    if model.num_experts is None:
        return []
    layers = num_expert_layers(model)
    where = "all layers" if layers == model.num_layers else f"{layers} of {model.num_layers} layers"
    width = model.moe_shared_expert_intermediate_size
    shared = f" and a shared one of width {width}" if width else ""
    active = short_count(plan.num_active_parameters)
    return [
        f"{model.num_experts} experts of width {model.moe_ffn_hidden_size}{shared} in {where}, {model.moe_router_topk} "
        f"per token: {active} parameters are active"
    ]


def _layout_lines(plan: Plan) -> list[str]:
    sequence = "; norms and dropouts split along the sequence" if plan.run.parallel.sequence_parallel else ""
    context = f"context {plan.context_parallel_size} x " if plan.context_parallel_size > 1 else ""
    ways = plan.expert_parallel_size
    experts = f"; {ways} data-parallel ranks share the experts" if ways > 1 else ""
    return [
        f"{plan.world_size} ranks = tensor {plan.tensor_parallel_size} x {context}"
        f"pipeline {plan.pipeline_parallel_size} x data {plan.data_parallel_size}{sequence}{experts}"
    ]


def _batch_lines(plan: Plan) -> list[str]:
    idle = [f"each pipeline stage idles {plan.pipeline_bubble:.0%} of the time"] if plan.pipeline_bubble else []
    return [
        f"{plan.global_batch_size:,} samples per step = micro-batch {plan.microbatch_size} x "
        f"{plan.num_microbatches} micro-batches x data {plan.data_parallel_size}",
        f"{plan.tokens_per_step:,} tokens per step = {plan.global_batch_size:,} samples x {plan.seq_length:,} tokens",
        *idle,
    ]


def _precision_lines(plan: Plan) -> list[str]:
    clipping = f"clipped to norm {plan.gradient_clipping:g}" if plan.gradient_clipping > 0 else "not clipped"
    lines = [
        f"{plan.precision} weights; gradients summed in {plan.grad_accum_dtype} and {clipping}; "
        f"ZeRO stage {plan.zero_stage}; {plan.run.optimizer.name}"
    ]
    if plan.deepspeed.offloads_parameters:
        lines.append("weights in host memory until a layer needs them")
    if plan.deepspeed.offloads_optimizer:
        if plan.deepspeed.optimizer_is_on_disk:
            lines.append("master weights and moments on a disk, the update in host memory")
        else:
            lines.append("master weights, moments and the update in host memory")
    if plan.precision == "fp16":
        kind = "dynamic, from" if plan.deepspeed.loss_scale_is_dynamic else "always"
        lines.append(
            f"loss scale {kind} {plan.deepspeed.initial_loss_scale:,.0f}; a step that overflows updates nothing"
        )
    return lines


def _run_lines(plan: Plan) -> list[str]:
    training = plan.run.training
    per_step, per_rank = plan.flops_per_step, plan.flops_per_step / plan.world_size
    recomputed = plan.hardware_flops_per_step / plan.flops_per_step
    recompute = f"; executed: {recomputed:.2f} x as many ({_recomputation(plan)})" if recomputed > 1 else ""
    return [
        f"{training.steps:,} steps, {short_count(training.steps * plan.tokens_per_step)} tokens, "
        f"{training.steps * per_step:.3g} FLOPs",
        f"{per_step:.3g} FLOPs per step, {per_rank:.3g} per rank{recompute}",
    ]


def _recomputation(plan: Plan) -> str:
    training = plan.run.training
    if training.recompute_granularity == "selective":
        return "attention cores recomputed"
    if training.recompute_method == "block":
        return f"first {training.recompute_num_layers} layers of each stage recomputed"
    segments = f" in segments of {training.recompute_num_layers}" if training.recompute_num_layers > 1 else ""
    return f"layers recomputed{segments}"


def _memory_table(plan: Plan) -> list[str]:
    """Table of the stages: what each holds, and estimated memory of one of its ranks."""
    contents = [stage_contents(plan, stage) for stage in range(plan.pipeline_parallel_size)]
    width = max(len("holds"), *(len(text) for text in contents))
    scale, unit = (GIB, "GiB") if plan.memory.total >= GIB else (1 << 20, "MiB")
    parts = [*MEMORY_PARTS, *(part for part in ("host", "disk") if getattr(plan.memory, part))]
    lines = [
        f"estimated memory per rank in {unit} (buckets, temporary tensors and the framework come on top)",
        f"{'stage':<7}{'holds':<{width}}" + "".join(f"{part:>13}" for part in parts),
    ]
    for text, estimate in zip(contents, plan.memory_per_stage, strict=True):
        sizes = "".join(f"{getattr(estimate, part) / scale:>13.2f}" for part in parts)
        lines.append(f"{estimate.stage:<7}{text:<{width}}{sizes}")
    return lines


def _sent_bytes(plan: Plan, stage: int) -> dict[str, int]:
    """Bytes that one rank of a stage sends in one step, by process group."""
    sent: dict[str, float] = {}
    for transfer in traffic_per_step(plan, stage):
        sent[transfer.group] = sent.get(transfer.group, 0.0) + transfer.ring_bytes
    return {group: round(size) for group, size in sent.items()}


def _sent_per_stage(plan: Plan) -> list[dict[str, int]]:
    return [_sent_bytes(plan, stage) for stage in range(plan.pipeline_parallel_size)]


def _traffic_table(plan: Plan) -> list[str]:
    """Table of what one rank of each stage sends in one step; nothing for a single rank."""
    rows = _sent_per_stage(plan)
    groups = list(dict.fromkeys(group for row in rows for group in row))
    if not groups:
        return []
    scale, unit = (GIB, "GiB") if max(max(row.values()) for row in rows if row) >= GIB else (1 << 20, "MiB")
    lines = [
        "",
        f"sent per rank and step in {unit}, by group of ranks (as by ring algorithms)",
        f"{'stage':<7}" + "".join(f"{group:>13}" for group in groups),
    ]
    for stage, row in enumerate(rows):
        lines.append(f"{stage:<7}" + "".join(f"{row.get(group, 0) / scale:>13.2f}" for group in groups))
    return lines
