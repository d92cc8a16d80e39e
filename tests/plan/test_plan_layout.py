"""Stages, padding and parameter counts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.plan import run_config_from_dict
from megagpt.plan.layout import (
    balanced_counts,
    count_parameters,
    embedding_parameters,
    padded_vocab_size,
    pipeline_stage_bounds,
    stage_parameters_per_rank,
    transformer_layer_parameters,
    transformer_layers_of_stage,
)

SMALL = {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 32}
BIASED = {"normalization": "LayerNorm", "add_bias_linear": True, "activation": "gelu"}


def small_model(**keys):
    return run_config_from_dict({"model": {**SMALL, **keys}, "training": {"steps": 1}}).model


@pytest.mark.parametrize(
    ("num_layers", "stages", "bounds"),
    [
        (4, 1, (0, 7)),
        (4, 2, (0, 3, 7)),
        (5, 2, (0, 4, 8)),  # no middle stage: the first gets it, since the head costs more than the embedding
        (5, 4, (0, 2, 3, 5, 8)),
        (6, 4, (0, 2, 4, 6, 9)),
        (7, 4, (0, 3, 5, 7, 10)),
        (3, 3, (0, 2, 3, 6)),
    ],
)
def test_uniform_stages(num_layers, stages, bounds):
    assert pipeline_stage_bounds(small_model(num_layers=num_layers), stages) == bounds


@given(stages=st.integers(1, 40), more=st.integers(0, 120))
def test_uniform_stages_hold_each_layer_once_and_evenly(stages, more):
    num_layers = stages + more
    bounds = pipeline_stage_bounds(small_model(num_layers=num_layers), stages)
    layers = [transformer_layers_of_stage(bounds, stage) for stage in range(stages)]
    assert [layer for stage in layers for layer in stage] == list(range(num_layers))
    counts = [len(stage) for stage in layers]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)
    assert (bounds[0], bounds[-1]) == (0, num_layers + 3)


def every_partition(sizes, stages):
    """All ways to cut the pipeline layers: the embedding stays with layer 0, the final norm with the head."""
    num_layers = len(sizes) - 3
    for cuts in itertools.combinations(range(2, num_layers + 2), stages - 1):
        yield (0, *cuts, num_layers + 3)


def stage_sizes(sizes, bounds):
    return [sum(sizes[first:last]) for first, last in itertools.pairwise(bounds)]


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    ends=st.tuples(st.integers(1, 30), st.integers(1, 2), st.integers(0, 30)),
    data=st.data(),
)
def test_balanced_stages_have_the_smallest_maximum_and_then_the_least_spread(layers, ends, data):
    sizes = (ends[0], *layers, *ends[1:])
    stages = data.draw(st.integers(1, len(layers) + 1))
    counts = balanced_counts(sizes, stages)
    assert sum(counts) == len(layers)
    assert all(counts[:-1])
    bounds = (0, *(1 + done for done in itertools.accumulate(counts[:-1])), len(sizes))
    best = min((max(found), sum(x * x for x in found)) for found in
               (stage_sizes(sizes, cuts) for cuts in every_partition(sizes, stages)))  # fmt: skip
    found = stage_sizes(sizes, bounds)
    assert (max(found), sum(size * size for size in found)) == best


def test_of_equally_good_stages_the_later_ones_hold_more():
    assert balanced_counts((0, *[3] * 10, 0, 0), 4) == (2, 2, 3, 3)


def test_a_heavy_vocabulary_takes_layers_from_the_first_and_the_last_stage():
    model = run_config_from_dict({"model": {"preset": "llama3-8b"}, "training": {"steps": 1}}).model
    bounds = pipeline_stage_bounds(model, 4, "parameters", 8, 128256 + 768)
    assert [len(transformer_layers_of_stage(bounds, stage)) for stage in range(4)] == [7, 9, 9, 7]
    tiny = small_model(num_layers=2, vocab_size=50257)
    bounds = pipeline_stage_bounds(tiny, 3, "parameters")
    assert [len(transformer_layers_of_stage(bounds, stage)) for stage in range(3)] == [1, 1, 0]


def test_written_stages():
    model = small_model()
    assert pipeline_stage_bounds(model, 4, (1, 1, 2, 1)) == (0, 2, 3, 5, 8)
    assert pipeline_stage_bounds(model, 3, (1, 4, 0)) == (0, 2, 6, 8)
    assert pipeline_stage_bounds(model, 1, (5,)) == (0, 8)


def test_largest_models_are_balanced_at_once():
    model = run_config_from_dict({"model": {"preset": "megatron-1t"}, "training": {"steps": 1}}).model
    bounds = pipeline_stage_bounds(model, 64, "parameters", 8)
    stages = [stage_parameters_per_rank(model, bounds, stage, 8, model.vocab_size) for stage in range(64)]
    assert max(stages) == 2 * transformer_layer_parameters(model, 8) + embedding_parameters(model, 51200 // 8)


@given(vocab=st.integers(1, 10**6), divisor=st.sampled_from([1, 64, 128]), tensor=st.sampled_from([1, 2, 3, 8]))
def test_padding_is_the_least_that_divides(vocab, divisor, tensor):
    padded = padded_vocab_size(vocab, divisor, tensor)
    assert padded % (divisor * tensor) == 0
    assert 0 <= padded - vocab < divisor * tensor


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # h = 64, 4 heads of 16 channels, f = 256: query/key/value, projection, the MLP's two projections, two norms
        ({"activation": "gelu"}, 64 * 192 + 64 * 64 + 64 * 256 + 256 * 64 + 2 * 64),
        ({"activation": "swiglu", "ffn_hidden_size": 80}, 64 * 192 + 64 * 64 + 3 * 64 * 80 + 2 * 64),
        ({"activation": "gelu", "num_query_groups": 2}, 64 * 128 + 64 * 64 + 2 * 64 * 256 + 2 * 64),
        ({"activation": "gelu", "kv_channels": 8}, 64 * 96 + 32 * 64 + 2 * 64 * 256 + 2 * 64),
        ({"activation": "gelu", "post_layernorms": True}, 64 * 192 + 64 * 64 + 2 * 64 * 256 + 4 * 64),
        ({"activation": "gelu", "qk_layernorm": True}, 64 * 192 + 64 * 64 + 2 * 64 * 256 + 2 * 64 + 2 * 16),
        ({"activation": "gelu", "add_qkv_bias": True}, 64 * 192 + 192 + 64 * 64 + 2 * 64 * 256 + 2 * 64),
        (BIASED, 64 * 192 + 192 + 64 * 64 + 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64),
    ],
)
def test_parameters_of_one_layer(keys, expected):
    assert transformer_layer_parameters(small_model(**keys)) == expected


@pytest.mark.parametrize("keys", [{}, BIASED, {"num_query_groups": 2, "add_qkv_bias": True}])
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
@pytest.mark.parametrize("untied", [True, False])
def test_stages_and_ranks_add_up_to_the_model(keys, positions, untied):
    model = small_model(**keys, position_embedding_type=positions, untie_embeddings_and_output_weights=untied)
    whole = count_parameters(model)
    one_rank = stage_parameters_per_rank(model, pipeline_stage_bounds(model, 1), 0, 1, model.vocab_size)
    assert one_rank == whole
    bounds = pipeline_stage_bounds(model, 3)
    staged = sum(stage_parameters_per_rank(model, bounds, stage, 1, model.vocab_size) for stage in range(3))
    copied = 0 if untied else model.vocab_size * model.hidden_size  # the last stage's copy of the embedding
    assert staged == whole + copied
    split = stage_parameters_per_rank(model, pipeline_stage_bounds(model, 1), 0, 2, model.vocab_size)
    norm_size = 64 * (2 if model.normalization == "LayerNorm" else 1)
    replicated = 11 * norm_size + (5 * 2 * 64 if model.add_bias_linear else 0)
    replicated += 32 * 64 if positions == "learned_absolute" else 0
    assert 2 * split == whole + replicated
