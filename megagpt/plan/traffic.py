"""What each rank says to others in one step: collectives, groups and bytes, worked out from the Plan.

Sources: "Megatron-LM" (arXiv 1909.08053, section 3) for tensor parallelism: two all-reduces of `s b h` in the forward
and two in the backward pass of a layer; "Reducing Activation Recomputation" (arXiv 2205.05198, section 4.2.2) for
sequence parallelism: all-gather and reduce-scatter in their place; "ZeRO" (arXiv 1910.02054, section 7) for data
parallelism: 2 P in stages 1 and 2, 3 P in stage 3. What Megatron-Core 0.16-0.19 and DeepSpeed 0.19 really do, and where
that is more, is counted as it is and said in a comment. `parallel/accounting.py` counts the real calls.

Scalars (gradient norm, overflow flag, loss) are left out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megagpt.plan.estimates import DTYPE_BYTES
from megagpt.plan.experts import mlp_sizes
from megagpt.plan.layout import (
    norm_parameters,
    norms_of_layer,
    stage_expert_parameters_per_rank,
    stage_parameters_per_rank,
    transformer_layer_parameters,
)
from megagpt.plan.plan import Plan
from megagpt.plan.recompute import layer_runs


def _once(ranks: int) -> float:
    return (ranks - 1) / ranks


RING_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": _once,
    "reduce_scatter": _once,
    "broadcast": _once,
    "all_to_all": _once,
    "reduce": _once,
    "gather": _once,
    "scatter": _once,
    "send": lambda ranks: 1.0,
    "recv": lambda ranks: 0.0,
    "barrier": lambda ranks: 0.0,
}
"""Ring bytes per byte of the whole tensor, by collective, from the number of ranks in the group.

Ring bytes are what a rank sends, on average over its group, if the collective is done in a ring: the least that any
algorithm can do for large tensors (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms"; nccl-tests calls
these factors those of the bus bandwidth). By this convention an all-reduce costs as much as a reduce-scatter plus an
all-gather of the same tensor, whatever a backend does.
"""


@dataclass(frozen=True)
class Transfer:
    """One kind of collective that a rank takes part in."""

    purpose: str
    """What for, in words."""
    group: str
    """tensor, context, data (data x context, or some of them), pipeline, embedding (first and last pipeline stage) or
    world (tensor x other ranks)."""
    collective: str
    """A key of RING_FACTORS."""
    size: int
    """Ranks of the group."""
    payload: int
    """Bytes of the whole tensors, summed over one step; on average over the ranks where routers decide."""
    is_uneven: bool = False
    """Whether the ranks' parts have different sizes."""

    def without_cuda(self) -> "Transfer":
        """What stands in for it on hosts without CUDA, as gloo knows no parts of different sizes."""
        return replace(self, collective="all_reduce") if self.is_uneven else self

    @property
    def ring_bytes(self) -> float:
        """Bytes that the rank sends in one step."""
        return RING_FACTORS[self.collective](self.size) * self.payload


def traffic_per_step(plan: Plan, stage: int) -> tuple[Transfer, ...]:
    """Everything that a rank of one pipeline stage sends in one step, scalars left out; groups of one rank too.

    How many tokens a rank's experts get is up to the routers: that part is the mean over the ranks of the stage.

    Args:
        plan: the layout.
        stage: 0 ... pipeline size - 1.
    """
    transfers = [
        *_tensor_parallel(plan, stage),
        *_context_parallel(plan, stage),
        *_experts(plan, stage),
        *_pipeline(plan, stage),
        *_data_parallel(plan, stage),
    ]
    return tuple(transfer for transfer in transfers if transfer.size > 1 and transfer.payload > 0)


def _activation_bytes(plan: Plan) -> int:
    """Bytes of the hidden states of one micro-batch: s b h, with the positions of one context-parallel rank."""
    return plan.chunk_length * plan.microbatch_size * plan.model.hidden_size * DTYPE_BYTES[plan.precision]


def _tensor_parallel(plan: Plan, stage: int) -> Iterator[Transfer]:
    """Activations and their gradients inside the layers, embedding, head and loss."""
    size, sbh, model = plan.tensor_parallel_size, _activation_bytes(plan), plan.model
    first, last = stage == 0, stage == plan.pipeline_parallel_size - 1
    sequence, passes = plan.run.parallel.sequence_parallel, plan.num_microbatches

    def transfer(purpose: str, collective: str, count: int) -> Transfer:
        return Transfer(purpose, "tensor", collective, size, count * passes * sbh)

    layers = len(plan.transformer_layers_of_stage(stage))
    forwards = _forwards(plan, stage)
    # Attention and MLP; routed experts talk by other means.
    branches = [2 if _has_mlp(plan, layer) else 1 for layer in plan.transformer_layers_of_stage(stage)]
    branch_forwards = sum(count * times for count, times in zip(branches, _forwards_by_layer(plan, stage), strict=True))
    if plan.run.training.distribute_saved_activations:
        kept = sum(run.is_recomputed for run in layer_runs(plan.run.training, layers))
        yield transfer("saved activations", "all_gather", kept)
    if sequence:
        # Attention and MLP each gather their input and scatter the sum of their output; backward the other way round,
        # and Megatron-Core keeps only its part of the input, so it gathers that again for the weight's gradient.
        yield transfer("layers", "all_gather", branch_forwards + 2 * sum(branches))
        yield transfer("layers", "reduce_scatter", branch_forwards + sum(branches))
        yield transfer("head", "all_gather", 1 * last)
        yield transfer("head", "reduce_scatter", 1 * last)
    else:
        yield transfer("layers", "all_reduce", branch_forwards + sum(branches))
        yield transfer("head", "all_reduce", 1 * last)
    if model.num_query_groups < size:
        # Ranks that share a key/value head cut its rows among them, so each gathers the projection's results.
        rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
        projected = plan.chunk_length * plan.microbatch_size * rows * DTYPE_BYTES[plan.precision] * passes
        yield Transfer("shared key/value heads", "tensor", "all_gather", size, forwards * projected)
        yield Transfer("shared key/value heads", "tensor", "reduce_scatter", size, layers * projected)
    yield _partial_gradients(plan, stage)
    if first:
        # Learned positions are added before the sequence is split, so that the words' sum is needed in whole.
        split_at_once = sequence and model.position_embedding_type != "learned_absolute"
        yield transfer("embedding", "reduce_scatter" if split_at_once else "all_reduce", 1)
        yield transfer("embedding", "all_gather", 1 * sequence)
    if last:
        # Largest logit, logit of the label and sum of exponentials of each token, in fp32.
        tokens = plan.chunk_length * plan.microbatch_size
        yield Transfer("loss", "tensor", "all_reduce", size, 3 * 4 * tokens * passes)


def _context_parallel(plan: Plan, stage: int) -> Iterator[Transfer]:
    """Ulysses (arXiv 2309.14509, section 3.1): query, key and value change places in one all-to-all before attention,
    its output in one after it, and their gradients in the backward pass."""
    size, model, tensor = plan.context_parallel_size, plan.model, plan.tensor_parallel_size
    heads, groups = model.num_attention_heads // tensor, max(model.num_query_groups // tensor, 1)
    # Key/value heads are repeated until the ranks can share them equally.
    exchanged = (2 * heads + 2 * math.lcm(groups, size)) * model.kv_channels
    layers = len(plan.transformer_layers_of_stage(stage))
    passes = (_forwards(plan, stage) + layers) * plan.num_microbatches
    tokens = plan.chunk_length * plan.microbatch_size
    yield Transfer(
        "attention heads", "context", "all_to_all", size, passes * tokens * exchanged * DTYPE_BYTES[plan.precision]
    )


def _forwards_by_layer(plan: Plan, stage: int) -> list[int]:
    """Forward passes through each layer of a stage per micro-batch: 2 if it is recomputed."""
    runs = layer_runs(plan.run.training, len(plan.transformer_layers_of_stage(stage)))
    return [1 + run.is_recomputed for run in runs for _ in range(run.num_layers)]


def _forwards(plan: Plan, stage: int) -> int:
    return sum(_forwards_by_layer(plan, stage))


def _has_mlp(plan: Plan, layer: int) -> bool:
    """Whether every token meets an MLP in a layer: that of a dense layer, or a shared expert."""
    return not plan.model.has_experts(layer) or plan.model.moe_shared_expert_intermediate_size is not None


def _experts(plan: Plan, stage: int) -> Iterator[Transfer]:
    """Tokens on their way to the experts and back, with what the routers must know of each other.

    Megatron-Core's `alltoall` sends each token to the k ranks of its experts and gathers what the tensor-parallel ranks
    have got; `allgather` gathers all tokens of the tensor x expert ranks. Backward the other way round.
    """
    model, parallel, passes = plan.model, plan.run.parallel, plan.num_microbatches
    tensor, ways, context = plan.tensor_parallel_size, plan.expert_parallel_size, plan.context_parallel_size
    if model.num_experts is None:
        return
    forward_counts = zip(plan.transformer_layers_of_stage(stage), _forwards_by_layer(plan, stage), strict=True)
    counts = [times for layer, times in forward_counts if model.has_experts(layer)]
    forwards, backwards = passes * sum(counts), passes * len(counts)
    tokens = plan.chunk_length * plan.microbatch_size // tensor
    # Weights of experts are fp32, and so are the sums of what the ranks make of a token.
    row, summed, weight = model.hidden_size * DTYPE_BYTES[plan.precision], model.hidden_size * 4, 4
    # See `parallel/accounting.py`: a group is called by the smallest one that it lies in.
    among_experts = "context" if context > 1 and ways <= context else "data"
    both = "world" if tensor > 1 and ways > 1 else "tensor" if tensor > 1 else among_experts
    if model.moe_aux_loss_coeff > 0:
        group = "tensor" if context == 1 else "context" if tensor == 1 else "world"
        counted = 8 * model.num_experts * backwards  # not in the first pass of a recomputed layer
        yield Transfer("tokens per expert, for the loss", group, "all_reduce", tensor * context, counted)
    if parallel.moe_token_dispatcher_type == "allgather":
        all_tokens = tokens * tensor * ways
        weights = all_tokens * model.num_experts * weight
        chosen = all_tokens * model.num_experts * forwards  # one byte each
        there = all_tokens * (forwards * row + backwards * summed) + forwards * weights + chosen
        back = all_tokens * (forwards * summed + backwards * row) + backwards * weights
        yield Transfer("tokens to experts", both, "all_gather", tensor * ways, there)
        yield Transfer("tokens from experts", both, "reduce_scatter", tensor * ways, back)
        return
    counted = 8 * model.num_experts * tensor * ways * forwards
    yield Transfer("tokens per expert", both, "all_gather", tensor * ways, counted)
    sent = tokens * model.moe_router_topk
    exchanged = (forwards + backwards) * sent * (2 * row + weight)
    yield Transfer("tokens to and from experts", among_experts, "all_to_all", ways, exchanged)
    gathered = sent * tensor
    there = gathered * (forwards * (row + weight) + backwards * summed)
    back = gathered * (forwards * summed + backwards * (row + weight))
    yield Transfer("tokens to parts of experts", "tensor", "all_gather", tensor, there, is_uneven=True)
    yield Transfer("tokens from parts of experts", "tensor", "reduce_scatter", tensor, back, is_uneven=True)


def _partial_gradients(plan: Plan, stage: int) -> Transfer:
    """Gradients of whole parameters that work on a part of the sequence or of the heads, once per micro-batch.

    The former are norms, routers and the biases after a split matrix under sequence parallelism (which experts need);
    the latter the norms of queries and keys, always.
    """
    model = plan.model
    layers, last = len(plan.transformer_layers_of_stage(stage)), stage == plan.pipeline_parallel_size - 1
    elements = sum(mlp_sizes(model, layer).replicated for layer in plan.transformer_layers_of_stage(stage))
    if plan.run.parallel.sequence_parallel:
        elements += (layers * norms_of_layer(model) + last) * norm_parameters(model)
        elements += 2 * layers * model.hidden_size if model.add_bias_linear else 0
    if model.qk_layernorm:
        elements += 2 * layers * norm_parameters(model, model.kv_channels)
    payload = elements * DTYPE_BYTES[plan.precision] * plan.num_microbatches
    return Transfer("gradients of norms and biases", "tensor", "all_reduce", plan.tensor_parallel_size, payload)


def _pipeline(plan: Plan, stage: int) -> Iterator[Transfer]:
    """One activation and one gradient per boundary and micro-batch; the tied embedding's gradient once per step."""
    stages, size, passes = plan.pipeline_parallel_size, plan.tensor_parallel_size, plan.num_microbatches
    if stages == 1:
        return
    after, before = stage < stages - 1, stage > 0
    sbh, sequence = _activation_bytes(plan), plan.run.parallel.sequence_parallel
    section = plan.deepspeed.raw.get("pipeline", {})
    cut_forward, cut_backward = (
        size > 1 and not sequence and section.get(key, True) for key in ("pipe_partitioned", "grad_partitioned")
    )
    # A part travels with its shape: number of dimensions, 3 sizes, number of parts, rank, bounds of the parts.
    shape = 8 * (1 + 3 + 2 + size + 1)
    activation = sbh // size + shape if cut_forward else sbh // (size if sequence else 1)
    gradient = sbh // size + shape if cut_backward else sbh // (size if sequence else 1)
    yield Transfer("activations", "pipeline", "send", 2, passes * activation * after)
    yield Transfer("activation gradients", "pipeline", "send", 2, passes * gradient * before)
    # What arrives in parts is made whole; the sender too keeps only its part until the backward pass.
    wholes = cut_forward * (before + after) + cut_backward * after
    yield Transfer("parts between stages", "tensor", "all_gather", size, passes * wholes * sbh)
    if not plan.model.untie_embeddings_and_output_weights and (not after or not before):
        rows = plan.padded_vocab_size // size
        payload = rows * plan.model.hidden_size * DTYPE_BYTES[plan.grad_accum_dtype]
        group = "pipeline" if stages == 2 else "embedding"
        yield Transfer("tied embedding's gradient", group, "all_reduce", 2, payload)


def _data_parallel(plan: Plan, stage: int) -> Iterator[Transfer]:
    """Gradients and updated weights; those of experts among the ranks that have the same ones."""
    tensor, ways, size = plan.tensor_parallel_size, plan.expert_parallel_size, plan.gradient_parallel_size
    parameters = stage_parameters_per_rank(plan.model, plan.stage_bounds, stage, tensor, plan.padded_vocab_size, ways)
    if ways == 1:
        yield from _replicas(plan, "", parameters, size)
        return
    experts = stage_expert_parameters_per_rank(plan.model, plan.stage_bounds, stage, tensor, ways)
    yield from _replicas(plan, "", parameters - experts, size)
    yield from _replicas(plan, "experts' ", experts, size // ways)


def _replicas(plan: Plan, whose: str, parameters: int, size: int) -> Iterator[Transfer]:
    """What `size` ranks with the same parameters do about them."""
    zero, passes = plan.deepspeed.raw.get("zero_optimization", {}), plan.num_microbatches
    # One and the same group is called by its first name, see `parallel/accounting.py`.
    group = "context" if plan.context_parallel_size > 1 and plan.data_parallel_size == 1 else "data"
    gradients = parameters * DTYPE_BYTES[plan.deepspeed.communication_data_type]
    weights = parameters * DTYPE_BYTES[plan.precision]
    if plan.zero_stage == 3:
        yield Transfer(f"{whose}gradients", group, "reduce_scatter", size, passes * gradients)
        gathered = passes * _gathered_parameters(plan, parameters) * DTYPE_BYTES[plan.precision]
        secondary = plan.deepspeed.secondary_partition_size
        if secondary > 1:
            # What has been gathered once in a step is cut again over fewer ranks, which suffice until the update.
            near = "context" if plan.context_parallel_size % secondary == 0 else "data"
            yield Transfer(f"{whose}weights, again", near, "all_gather", secondary, gathered - weights)
            gathered = weights
        yield Transfer(f"{whose}weights", group, "all_gather", size, gathered)
        return
    # Stage 2 keeps no whole gradients from one micro-batch to the next, so it reduces each one. DeepSpeed's default
    # reduces a bucket for all ranks at once, by an all-reduce: twice the bytes of a reduce-scatter.
    times = passes if plan.zero_stage == 2 else 1
    one_by_one = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    if plan.precision == "bf16" and plan.zero_stage == 1 and plan.grad_accum_dtype == "fp32":
        one_by_one = one_by_one and plan.deepspeed.offloads_optimizer  # DeepSpeed's BF16_Optimizer knows no such key
    collective = "reduce" if one_by_one else "all_reduce"
    yield Transfer(f"{whose}gradients", group, collective, size, times * gradients)
    yield Transfer(f"{whose}weights", group, "all_gather", size, weights)


def _gathered_parameters(plan: Plan, parameters: int) -> int:
    """What stage 3 gathers of `parameters` for a micro-batch: all for the forward and again for the backward pass.

    Layers below the thresholds of the JSON stay, which is not counted.
    """
    tensor, gathered = plan.tensor_parallel_size, 2 * parameters
    if not plan.model.untie_embeddings_and_output_weights:  # as the head, too
        gathered += 2 * plan.padded_vocab_size // tensor * plan.model.hidden_size
    for layer, forwards in enumerate(_forwards_by_layer(plan, 0)):  # once more where it is recomputed
        gathered += (forwards - 1) * transformer_layer_parameters(plan.model, tensor, layer)
    return gathered
