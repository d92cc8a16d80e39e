"""Names and shapes of a model's parameters, independent of how it was spread over ranks.

Every tensor is full (no tensor-parallel shard) and has the tokenizer's vocabulary (no padding). Shape letters of the
package: h hidden size, n query heads, g query groups (key/value heads), d channels per head, f MLP width, E experts,
V vocabulary, P positions.
"""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig


@lru_cache(maxsize=32)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads, groups, hidden = model.num_attention_heads, model.num_query_groups, model.hidden_size
    if heads % groups:
        raise ConversionError(
            f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}; "
            f"set num_query_groups to a divisor of {heads}"
        )
    query_rows, fc1_branches = heads * model.kv_channels, 2 if model.is_gated else 1
    shapes = dict[str, tuple[int, ...]]()

    def add(module: str, shape: tuple[int, ...], bias: bool) -> None:
        shapes[f"{module}.weight"] = shape
        if bias:
            shapes[f"{module}.bias"] = shape[:1]

    def add_norm(module: str, channels: int = hidden) -> None:
        add(module, (channels,), bias=model.normalization == "LayerNorm")

    def add_mlp(module: str, width: int) -> None:
        add(f"{module}.linear_fc1", (fc1_branches * width, hidden), bias=model.add_bias_linear)
        add(f"{module}.linear_fc2", (hidden, width), bias=model.add_bias_linear)

    def add_experts(module: str) -> None:
        assert model.num_experts is not None
        add(f"{module}.router", (model.num_experts, hidden), bias=False)
        for expert in range(model.num_experts):
            add_mlp(f"{module}.experts.{expert}", model.moe_ffn_hidden_size)
        if model.moe_shared_expert_intermediate_size is not None:
            add_mlp(f"{module}.shared_experts", model.moe_shared_expert_intermediate_size)
            if model.moe_shared_expert_gate:
                shapes[f"{module}.shared_experts.gate_weight"] = (1, hidden)

    add("embedding.word_embeddings", (model.vocab_size, hidden), bias=False)
    if model.position_embedding_type == "learned_absolute":
        add("embedding.position_embeddings", (model.max_position_embeddings, hidden), bias=False)
    for i in range(model.num_layers):
        layer, bias = f"layers.{i}", model.add_bias_linear
        add_norm(f"{layer}.input_layernorm")
        qkv_rows = query_rows + 2 * groups * model.kv_channels
        add(f"{layer}.self_attention.linear_qkv", (qkv_rows, hidden), bias=model.has_qkv_bias)
        add(f"{layer}.self_attention.linear_proj", (hidden, query_rows), bias=bias)
        if model.qk_layernorm:
            add_norm(f"{layer}.self_attention.q_layernorm", model.kv_channels)
            add_norm(f"{layer}.self_attention.k_layernorm", model.kv_channels)
        if model.post_layernorms:
            add_norm(f"{layer}.post_self_attn_layernorm")
        add_norm(f"{layer}.pre_mlp_layernorm")
        if not model.has_experts(i):
            add_mlp(f"{layer}.mlp", model.ffn_hidden_size)
        else:
            add_experts(f"{layer}.mlp")
        if model.post_layernorms:
            add_norm(f"{layer}.post_mlp_layernorm")
    add_norm("final_norm")
    if model.untie_embeddings_and_output_weights:
        add("head", (model.vocab_size, hidden), bias=False)
    return shapes


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All parameters of the model in the order of its layers: canonical name -> full shape.

    Raises:
        ConversionError: the query heads do not divide into the query groups.
    """
    return dict(_shapes(model))


def check_names(present: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Account for every name on both sides.

    Args:
        present: names found.
        expected: names that the model has.
        where: what `present` was read from, for the message.

    Raises:
        ConversionError: names are missing, unknown or given twice; the message lists them.
    """
    found = list(present)
    wanted = dict.fromkeys(expected)
    problems = []
    counts = Counter(found)
    if missing := [name for name in wanted if name not in counts]:
        problems.append(f"lacks {shorten(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        problems.append(f"has {shorten(unknown)}, which this model does not know")
    if twice := [name for name in wanted if counts[name] > 1]:
        problems.append(f"lists {shorten(twice)} more than once")
    if problems:
        raise ConversionError(f"{where} {' and '.join(problems)}; convert it with the model config it was made with")


def shorten(names: list[str], limit: int = 12) -> str:
    """Join names for a message; beyond `limit` only their number is told."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
