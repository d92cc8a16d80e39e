"""FLOPs per step and memory per rank, from published formulas.

Sources: "Efficient Large-Scale Language Model Training on GPU Clusters" (arXiv 2104.04473, eq. 3) and "Reducing
Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, table 2 and appendix A) for FLOPs and
activations; "ZeRO" (arXiv 1910.02054, section 5) for model states. Letters as there: s sequence, b micro-batch,
h hidden size, t tensor-parallel size, L layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megagpt.plan.config import ModelConfig, TrainingConfig
from megagpt.plan.deepspeed_config import Precision
from megagpt.plan.experts import mlp_sizes, num_expert_layers, projections
from megagpt.plan.layout import norms_of_layer
from megagpt.plan.recompute import layer_runs

DTYPE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
SMALLEST_CHUNK_BYTES = 64 << 20
"""Logits of the head that may always exist at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of one pipeline stage.

    Communication buckets, temporary tensors, fragmentation and the framework come on top: on the 20 layouts of a
    181-billion-parameter model that BigScience measured, this estimate is 64 to 81 % of the bytes in use.
    """

    stage: int
    """The pipeline stage that this is about."""
    weights: int
    """Weights in the precision of the forward pass."""
    gradients: int
    """Gradients in the type in which they are accumulated."""
    optimizer: int
    """fp32 master weights (of 16-bit or offloaded ones) and, for AdamW, two moments."""
    activations: int
    """What the backward pass needs of all micro-batches in flight."""
    host: int = 0
    """Model states offloaded to this rank's share of host memory; not part of the total."""
    disk: int = 0
    """Model states offloaded to a disk; not part of the total."""

    @property
    def total(self) -> int:
        """Sum of all parts on the device in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


class StateBytes(NamedTuple):
    """Bytes of model states of one rank."""

    weights: int
    gradients: int
    optimizer: int
    host: int
    """What is offloaded from the device."""
    disk: int = 0
    """What is offloaded to a disk."""


def model_flops_per_step(model: ModelConfig, seq_length: int, global_batch_size: int) -> int:
    """FLOPs that one step needs, recomputation not counted: the numerator of model FLOPs utilisation (MFU).

    arXiv 2205.05198, appendix A, `72 B L s h^2 (1 + s/(6h) + V/(12 h L))`, generalised to grouped queries, gated
    MLPs and any head size: 2 FLOPs per multiply-add, backward = 2 x forward. As there, attention counts the full
    s x s matrix although half of it is masked, and the vocabulary is the unpadded one. A sliding window of w positions
    counts its band in the same way: w (2 s - w) instead of s^2. Of routed experts those that a token is sent to count.
    """
    layers, head = _forward_flops_per_sample(model, seq_length)
    return 3 * (layers + head) * global_batch_size


def hardware_flops_per_step(
    model: ModelConfig, seq_length: int, global_batch_size: int, training: TrainingConfig, recomputed_layers: int
) -> int:
    """FLOPs that are executed in one step: recomputed layers run their forward pass twice.

    With every layer recomputed this is arXiv 2104.04473, eq. 3: `96 B s L h^2 (1 + s/(6h) + V/(16 L h))`. Selective
    recomputation runs the attention core's forward pass (`4 B s^2 h L`) twice, and so do soft-capped scores.

    Args:
        training: gives the granularity.
        recomputed_layers: layers of the whole model that `full` recomputes.
    """
    layers, head = _forward_flops_per_sample(model, seq_length)
    again = layers * recomputed_layers // model.num_layers
    if training.recompute_granularity == "selective" or model.attn_logit_softcapping is not None:
        again += _attention_core_flops_per_sample(model, seq_length)
    return (3 * (layers + head) + again) * global_batch_size


def _forward_flops_per_sample(model: ModelConfig, seq_length: int) -> tuple[int, int]:
    """FLOPs of the forward pass for one sample: (all transformer layers, head)."""
    hidden = model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    mlps = 2 * sum(mlp_sizes(model, layer).active for layer in range(model.num_layers)) * seq_length
    projected = model.num_layers * 2 * hidden * (2 * query + key_value) * seq_length
    attention = _attention_core_flops_per_sample(model, seq_length)
    return projected + attention + mlps, 2 * hidden * model.vocab_size * seq_length


def _attention_core_flops_per_sample(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of scores and weighted values of all layers, forward, for one sample."""
    windows = [min(model.window_of_layer(i) or seq_length, seq_length) for i in range(model.num_layers)]
    band = sum(window * (2 * seq_length - window) for window in windows)
    return 2 * 2 * band * model.num_attention_heads * model.kv_channels


def model_state_bytes(
    parameters: int,
    precision: Precision,
    grad_accum_dtype: Precision,
    zero_stage: int,
    gradient_parallel_size: int,
    optimizer: str,
    offloads_optimizer: bool = False,
    offloads_parameters: bool = False,
    secondary_partition_size: int = 1,
    swap_buffers: tuple[int, int] | None = None,
) -> StateBytes:
    """Bytes of model states on one rank that holds `parameters` before ZeRO's sharding.

    ZeRO (arXiv 1910.02054), 16 bit with Adam, N = data x context parallel size: stage 1 `(4 + 12/N) P`, stage 2
    `(2 + 14/N) P`, stage 3 `16 P / N`. Gradients count 4 bytes instead of 2 when they are accumulated in fp32.
    fp32 weights are their own master copy, unless the optimizer is offloaded.

    Offloading the optimizer moves its states to the host, and adds fp32 gradients for them and (stages 1 and 2) a copy
    of the weights on their way back; under stage 3 the accumulated gradients move too. Offloading parameters (stage 3)
    moves the weights; what a layer has gathered while it computes is not counted.

    ZeRO++'s hpZ (arXiv 2306.10209) cuts a second copy of stage 3's weights over S ranks of a host: `2 P / S` more, from
    the first forward pass of a step to the update.

    With `swap_buffers`, their number and the most elements of each, an offloaded optimizer (stage 3) is on a disk, with
    the gradients of the update: buffers for parts of it and the accumulated gradients remain in host memory.
    """
    ranks = gradient_parallel_size
    weights = parameters * DTYPE_BYTES[precision]
    gradients = parameters * DTYPE_BYTES[grad_accum_dtype]
    has_masters = precision != "fp32" or offloads_optimizer
    states = parameters * (4 * has_masters + (8 if optimizer == "adamw" else 0))
    part = -(-parameters // ranks)
    weights = -(-weights // ranks) if zero_stage >= 3 else weights
    if secondary_partition_size > 1:
        weights += -(-parameters * DTYPE_BYTES[precision] // secondary_partition_size)
    gradients = -(-gradients // ranks) if zero_stage >= 2 else gradients
    states = -(-states // ranks) if zero_stage >= 1 else states
    host = disk = 0
    if offloads_optimizer:
        host, states = states + 4 * part, 0
        if swap_buffers is not None:
            count, most_elements = swap_buffers
            disk, host = host, 4 * count * min(part, most_elements)
        if zero_stage >= 3:
            host, gradients = host + gradients, 0
        else:
            host += DTYPE_BYTES[precision] * part
    if offloads_parameters:
        host, weights = host + weights, 0
    return StateBytes(weights, gradients, states, host, disk)


def layer_activation_bytes(
    model: ModelConfig, seq_length: int, microbatch_size: int, tensor_parallel_size: int, sequence_parallel: bool,
    precision: Precision,
) -> int:  # fmt: skip
    """Bytes that one transformer layer keeps for the backward pass of one micro-batch.

    arXiv 2205.05198, table 2, the rows "selective": `s b h (10 + 24/t)`, with sequence parallelism `34 s b h / t`;
    the s x s attention matrix (`5 a s / h`) is never stored because attention is fused. Those constants hold for
    multi-head attention and a 4h MLP with dropout; here they are built up from their parts: inputs of the two norms
    and of the two projections after them (8), dropout masks (2, if any); query, key, value and the attention's output
    (8 of the 24), inputs of activation and second MLP projection (16 of the 24). Normalised queries and keys are kept
    besides the raw ones, a sliding window for which GPUs have no kernel keeps keys and values repeated for each query
    head, and norms around 1 keep their inputs in fp32. The norms of a parallel residual have one input. Rotary tables
    and the statistics of norms and attention are left out: about 1 % together. A layer with experts keeps what an MLP
    does for each expert that a token is sent to, with input and output of the experts (whole on each tensor-parallel
    rank), if all experts get equally many tokens; a model that has such layers is taken to have no others.
    """
    tokens = seq_length * microbatch_size
    width = DTYPE_BYTES[precision]
    norm_inputs = 1 if model.parallel_residual else norms_of_layer(model)
    of_norms = norm_inputs * (4 if model.layernorm_zero_centered_gamma else width)
    of_dropout = 2 if model.hidden_dropout > 0 else 0
    along_hidden = (of_norms + 2 * width + of_dropout) * model.hidden_size
    query, key = model.num_attention_heads, model.num_query_groups
    heads = 2 * query + 2 * key  # query, output; key, value
    if model.qk_layernorm:
        heads += query + key
    is_windowed = model.sliding_window is not None and model.sliding_window < seq_length
    if is_windowed and model.attn_logit_softcapping is None and key < query and not _has_kernel(model, precision):
        heads += 2 * query
    heads *= model.kv_channels
    has_experts = num_expert_layers(model) > 0
    chosen = model.moe_router_topk if has_experts else 0
    mlp_width = model.ffn_hidden_size
    if has_experts:
        mlp_width = chosen * model.moe_ffn_hidden_size + (model.moe_shared_expert_intermediate_size or 0)
    split = width * (heads + mlp_width * projections(model))
    dispatched = tokens * width * 2 * chosen * model.hidden_size
    if sequence_parallel:
        return dispatched + tokens * (along_hidden + split) // tensor_parallel_size
    return dispatched + tokens * (along_hidden + split // tensor_parallel_size)


def _has_kernel(model: ModelConfig, precision: Precision) -> bool:
    """Whether GPUs have a kernel for the model's windows; see `megagpt.model.varlen`."""
    channels = model.kv_channels
    return precision != "fp32" and model.attention_dropout == 0 and channels % 8 == 0 and channels <= 256


def stage_activation_bytes(
    model: ModelConfig,
    *,
    num_stage_layers: int,
    microbatches_in_flight: int,
    has_head: bool,
    padded_vocab_size: int,
    seq_length: int,
    microbatch_size: int,
    tensor_parallel_size: int,
    sequence_parallel: bool,
    training: TrainingConfig,
    precision: Precision,
) -> int:
    """Bytes of activations on one rank of a pipeline stage at its peak.

    Under 1F1B, stage p of P keeps `min(P - p, micro-batches)` micro-batches. A recomputed run of layers keeps its
    input only (`2 s b h`, table 2; less if that is split over tensor-parallel ranks or offloaded), and the longest run
    is expanded once. Recomputing the attention core only keeps as much as a fused kernel does. The head adds a chunk of
    its fp32 logits at a time, twice with a soft cap, and in 16 bit the fp32 sum of its weight's gradient over chunks.
    Under context parallelism s is a rank's part of the sequence.
    """
    layer = layer_activation_bytes(
        model, seq_length, microbatch_size, tensor_parallel_size, sequence_parallel, precision
    )
    tokens = seq_length * microbatch_size
    run_input = DTYPE_BYTES[precision] * tokens * model.hidden_size
    if sequence_parallel or training.distribute_saved_activations:
        run_input //= tensor_parallel_size
    if training.offload_saved_activations:
        run_input = 0
    runs = layer_runs(training, num_stage_layers)
    per_microbatch = sum(run_input if run.is_recomputed else run.num_layers * layer for run in runs)
    expanded = max((run.num_layers * layer for run in runs if run.is_recomputed), default=0)
    head = 0
    if has_head:
        vocabulary = padded_vocab_size // tensor_parallel_size
        copies = 1 if model.final_logit_softcapping is None else 2
        chunk = head_chunk_tokens(tokens, vocabulary, model.hidden_size)
        summed = model.hidden_size if chunk < tokens and precision != "fp32" else 0
        head = 4 * vocabulary * (copies * chunk + summed)
    return microbatches_in_flight * per_microbatch + expanded + head


def head_chunk_tokens(num_tokens: int, vocabulary: int, hidden_size: int) -> int:
    """Tokens whose logits exist at a time.

    As many as make their fp32 logits as large as the gradient of the head's weight, which is held anyway, or 64 MiB;
    then all chunks nearly equal. Half as many more are taken at once: summing that gradient over two chunks would take
    as much memory again.

    Args:
        num_tokens: tokens of a micro-batch on this rank.
        vocabulary: rows of the head's weight on this rank.
        hidden_size: columns of it.
    """
    largest = max(hidden_size, SMALLEST_CHUNK_BYTES // (4 * vocabulary), 1)
    num_chunks = -(-num_tokens // largest) if 2 * num_tokens > 3 * largest else 1
    return -(-num_tokens // num_chunks)
