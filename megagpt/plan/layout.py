"""Which rank holds which layers and how many parameters they have.

A model is a list of L + 3 pipeline layers: [embedding, L transformer layers, final norm, head].
"""

from megagpt.plan.config import ModelConfig


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding table: `vocab_size` rounded up so that all tensor-parallel shards are equal."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def pipeline_stage_bounds(num_layers: int, pipeline_parallel_size: int) -> tuple[int, ...]:
    """Spread the pipeline layers over the stages.

    Transformer layers are spread as evenly as possible. Of the stages that get one more, the middle ones come first,
    since the first and last also hold embedding and head; among them the later ones, which keep the activations of
    fewer micro-batches under 1F1B.

    Returns:
        PP + 1 indices into the list of L + 3 pipeline layers: stage p holds `bounds[p] .. bounds[p + 1] - 1`.
    """
    stages = pipeline_parallel_size
    assert 1 <= stages <= num_layers, (stages, num_layers)
    counts = [num_layers // stages] * stages
    middle_then_ends = [*range(stages - 2, 0, -1), 0, stages - 1]
    for stage in middle_then_ends[: num_layers % stages]:
        counts[stage] += 1
    bounds = [0, 1 + counts[0]]
    for count in counts[1:]:
        bounds.append(bounds[-1] + count)
    bounds[-1] = num_layers + 3  # final norm and head
    return tuple(bounds)


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


def transformer_layer_parameters(model: ModelConfig, tensor_parallel_size: int = 1) -> int:
    """Parameters of one transformer layer on one rank.

    Projections into heads and into the MLP are split over tensor-parallel ranks with their biases; projections out
    of them are split but their biases, like the norms, are replicated.
    """
    hidden = model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    query_key_value = query + 2 * model.num_query_groups * model.kv_channels
    fc1 = model.ffn_hidden_size * (2 if model.is_gated else 1)
    split = query_key_value * hidden + query * hidden + fc1 * hidden + model.ffn_hidden_size * hidden
    replicated = 2 * norm_parameters(model)
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
    layers = model.num_layers * transformer_layer_parameters(model)
    return embedding_parameters(model, model.vocab_size) + layers + norm_parameters(model) + head


def stage_parameters_per_rank(
    model: ModelConfig, bounds: tuple[int, ...], stage: int, tensor_parallel_size: int, padded_vocab: int
) -> int:
    """Parameters that one rank of a stage holds, padding included and before ZeRO shards anything.

    With tied embeddings the last stage holds its own copy of the word embedding.
    """
    first, last = stage == 0, stage == len(bounds) - 2
    vocab_rows = padded_vocab // tensor_parallel_size
    total = len(transformer_layers_of_stage(bounds, stage)) * transformer_layer_parameters(model, tensor_parallel_size)
    if first:
        total += embedding_parameters(model, vocab_rows)
    if last:
        total += norm_parameters(model)
        if model.untie_embeddings_and_output_weights or not first:
            total += vocab_rows * model.hidden_size
    return total
