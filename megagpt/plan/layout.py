"""Which rank holds which layers and how many parameters they have.

A model is a list of L + 3 pipeline layers: [embedding, L transformer layers, final norm, head].
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

from megagpt.plan.config import ModelConfig, PipelinePartition, RunConfig
from megagpt.plan.experts import mlp_sizes


def divisors(number: int) -> Iterable[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding table: `vocab_size` rounded up so that all tensor-parallel shards are equal."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def pipeline_stage_bounds(
    model: ModelConfig,
    pipeline_parallel_size: int,
    partition: PipelinePartition = "uniform",
    tensor_parallel_size: int = 1,
    padded_vocab: int | None = None,
    expert_parallel_size: int = 1,
) -> tuple[int, ...]:
    """Cut the list of pipeline layers into stages.

    Args:
        model: the architecture.
        pipeline_parallel_size: number of stages.
        partition: "uniform", "parameters" or the number of transformer layers of each stage.
        tensor_parallel_size: "parameters" balances what one rank holds.
        padded_vocab: rows of the embedding table over all tensor-parallel ranks; the vocabulary itself by default.
        expert_parallel_size: as `tensor_parallel_size`.

    Returns:
        PP + 1 indices into the list of L + 3 pipeline layers: stage p holds `bounds[p] .. bounds[p + 1] - 1`.
    """
    counts: Sequence[int]
    if partition == "uniform":
        counts = uniform_counts(model.num_layers, pipeline_parallel_size)
    elif partition == "parameters":
        sizes = pipeline_layer_parameters(
            model,
            pipeline_parallel_size,
            tensor_parallel_size,
            padded_vocab or model.vocab_size,
            expert_parallel_size,
        )
        counts = balanced_counts(tuple(sizes), pipeline_parallel_size)
    else:
        counts = partition
    assert len(counts) == pipeline_parallel_size and sum(counts) == model.num_layers, counts
    bounds = [0, *(1 + done for done in itertools.accumulate(counts))]
    bounds[-1] = model.num_layers + 3  # final norm and head
    return tuple(bounds)


def stage_bounds_of_run(run: RunConfig) -> tuple[int, ...]:
    """What `pipeline_stage_bounds` gives for the layout of a run."""
    model, parallel = run.model, run.parallel
    tensor = parallel.tensor_model_parallel_size
    return pipeline_stage_bounds(
        model,
        parallel.pipeline_model_parallel_size,
        parallel.pipeline_partition,
        tensor,
        padded_vocab_size(model.vocab_size, parallel.make_vocab_size_divisible_by, tensor),
        parallel.expert_model_parallel_size,
    )


def uniform_counts(num_layers: int, stages: int) -> list[int]:
    """Transformer layers per stage, as evenly as possible.

    Of the stages that get one more, the middle ones come first, since the first and last also hold embedding and head;
    among them the later ones, which keep the activations of fewer micro-batches under 1F1B.
    """
    assert 1 <= stages <= num_layers, (stages, num_layers)
    counts = [num_layers // stages] * stages
    middle_then_ends = [*range(stages - 2, 0, -1), 0, stages - 1]
    for stage in middle_then_ends[: num_layers % stages]:
        counts[stage] += 1
    return counts


@functools.lru_cache(maxsize=1024)  # who tries many layouts meets the same sizes again
def balanced_counts(sizes: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Transformer layers per stage such that the largest stage is as small as it can be.

    Of the partitions with that smallest maximum it is the one with the least sum of squares (the most even one), and of
    several the one with more layers in later stages, which keep the activations of fewer micro-batches under 1F1B. The
    last stage may hold no transformer layer, if the head fills it.

    Args:
        sizes: of all pipeline layers: [embedding, transformer layers, final norm, head].
        stages: number of stages, at most the number of transformer layers + 1.
    """
    # the embedding goes with the first layer, the final norm with the head
    parts = [sizes[0] + sizes[1], *sizes[2:-2], sizes[-2] + sizes[-1]]
    assert 1 <= stages <= len(parts), (stages, len(parts))
    sums = [0, *itertools.accumulate(parts)]
    largest = _smallest_maximum(parts, sums, stages)
    table: list[tuple[float, int]] = [(math.inf, 0)] * len(parts) + [(0, 0)]  # what no stage holds: no parts
    tables = []
    for _ in range(stages):
        table = [*(_cheapest_cut(sums, start, table, largest) for start in range(len(parts))), (math.inf, 0)]
        tables.append(table)
    counts, start = [], 0
    for table in reversed(tables):
        _, end = table[start]
        counts.append(end - start)
        start = end
    counts[-1] -= 1
    return tuple(counts)


def _cheapest_cut(
    sums: Sequence[int], start: int, rest: Sequence[tuple[float, int]], largest: int
) -> tuple[float, int]:
    """Least sum of squares of stages that begin with part `start`, and where the first of them ends.

    Args:
        sums: cumulative sizes of the parts, from 0.
        start: first part.
        rest: the same for one stage less, by first part.
        largest: limit of each stage.
    """
    best = (math.inf, start)
    for end in range(start + 1, len(sums)):
        size = sums[end] - sums[start]
        if size > largest:
            break
        best = min(best, (size**2 + rest[end][0], end))  # of equally good cuts the earliest: later stages hold more
    return best


def _smallest_maximum(parts: Sequence[int], sums: Sequence[int], stages: int) -> int:
    """Least value that the largest of `stages` contiguous, non-empty stages can have: bisection over all their sums."""

    def fits(limit: int) -> bool:
        needed, filled = 1, 0
        for part in parts:
            if filled + part > limit:
                needed, filled = needed + 1, 0
            filled += part
        return needed <= stages  # fewer are enough: a stage of several layers can be cut again

    low = max(parts)
    candidates = sorted({sums[j] - sums[i] for i in range(len(parts)) for j in range(i + 1, len(sums))})
    candidates = candidates[bisect.bisect_left(candidates, low) :]
    return candidates[bisect.bisect_left(candidates, True, key=fits)]


def transformer_layers_of_stage(bounds: tuple[int, ...], stage: int) -> range:
    """Transformer layers of one stage, counted from 0 over the whole model."""
    num_layers = bounds[-1] - 3
    return range(max(bounds[stage] - 1, 0), min(bounds[stage + 1] - 1, num_layers))


def embedding_parameters(model: ModelConfig, vocab_rows: int) -> int:
    """Parameters of the word embedding, of `vocab_rows` rows, and of learned positions."""
    positions = model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0
    return (vocab_rows + positions) * model.hidden_size


def norm_parameters(model: ModelConfig, channels: int | None = None) -> int:
    """Parameters of one normalisation of so many channels (default: hidden_size): a weight, and a LayerNorm's bias."""
    return (channels or model.hidden_size) * (2 if model.normalization == "LayerNorm" else 1)


def norms_of_layer(model: ModelConfig) -> int:
    """Normalisations of the hidden states in one transformer layer."""
    return 4 if model.post_layernorms else 2


def transformer_layer_parameters(
    model: ModelConfig, tensor_parallel_size: int = 1, layer: int = 0, expert_parallel_size: int = 1
) -> int:
    """Parameters of one transformer layer, counted from 0, on one rank.

    Projections into heads and into the MLP are split over tensor-parallel ranks with their biases; projections out
    of them are split but their biases, like the norms and routers, are replicated.
    """
    hidden = model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    query_key_value = query + 2 * model.num_query_groups * model.kv_channels
    fc1 = model.ffn_hidden_size * (2 if model.is_gated else 1)
    mlp = mlp_sizes(model, layer)
    split = query_key_value * hidden + query * hidden + mlp.dense + mlp.routed // expert_parallel_size
    replicated = norms_of_layer(model) * norm_parameters(model) + mlp.replicated
    if model.qk_layernorm:
        replicated += 2 * norm_parameters(model, model.kv_channels)
    if model.has_qkv_bias:
        split += query_key_value
    if model.add_bias_linear:
        split += fc1
        replicated += 2 * hidden
    return split // tensor_parallel_size + replicated


def count_parameters(model: ModelConfig) -> int:
    """Exact number of parameters of the model, without padding of the vocabulary."""
    head = model.vocab_size * model.hidden_size if model.untie_embeddings_and_output_weights else 0
    layers = sum(transformer_layer_parameters(model, layer=layer) for layer in range(model.num_layers))
    return embedding_parameters(model, model.vocab_size) + layers + norm_parameters(model) + head


def count_active_parameters(model: ModelConfig) -> int:
    """Parameters that one token meets: of the routed experts only the chosen ones."""
    sizes = [mlp_sizes(model, layer) for layer in range(model.num_layers)]
    return count_parameters(model) - sum(mlp.routed - mlp.active_routed for mlp in sizes)


def stage_expert_parameters_per_rank(
    model: ModelConfig, bounds: tuple[int, ...], stage: int, tensor_parallel_size: int, expert_parallel_size: int
) -> int:
    """Parameters of routed experts that one rank of a stage holds, before ZeRO shards any."""
    layers = transformer_layers_of_stage(bounds, stage)
    return sum(mlp_sizes(model, layer).routed for layer in layers) // (tensor_parallel_size * expert_parallel_size)


def pipeline_layer_parameters(
    model: ModelConfig,
    pipeline_parallel_size: int,
    tensor_parallel_size: int,
    padded_vocab: int,
    expert_parallel_size: int = 1,
) -> list[int]:
    """Parameters that one rank holds of each of the L + 3 pipeline layers, padding included, before ZeRO shards any.

    With tied embeddings the last of several stages holds its own copy of the word embedding, as the head.
    """
    vocab_rows = padded_vocab // tensor_parallel_size
    has_head = model.untie_embeddings_and_output_weights or pipeline_parallel_size > 1
    return [
        embedding_parameters(model, vocab_rows),
        *(
            transformer_layer_parameters(model, tensor_parallel_size, layer, expert_parallel_size)
            for layer in range(model.num_layers)
        ),
        norm_parameters(model),
        vocab_rows * model.hidden_size if has_head else 0,
    ]


def stage_parameters_per_rank(
    model: ModelConfig,
    bounds: tuple[int, ...],
    stage: int,
    tensor_parallel_size: int,
    padded_vocab: int,
    expert_parallel_size: int = 1,
) -> int:
    """Parameters that one rank of a stage holds, padding included and before ZeRO shards anything."""
    sizes = pipeline_layer_parameters(model, len(bounds) - 1, tensor_parallel_size, padded_vocab, expert_parallel_size)
    return sum(sizes[bounds[stage] : bounds[stage + 1]])
