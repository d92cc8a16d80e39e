"""Names and shapes of a model's parameters, independent of how it was spread over ranks.

Every tensor is full (no tensor-parallel shard) and has the tokenizer's vocabulary (no padding). Shape letters of the
package: h hidden size, n query heads, g query groups (key/value heads), d channels per head, f MLP width,
V vocabulary, P positions, u = 2 for gated activations and 1 otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig

GATED_ACTIVATIONS = ("swiglu", "geglu")


@dataclass(frozen=True)
class Dims:
    """Sizes of a model with its defaults filled in."""

    hidden: int
    heads: int
    groups: int
    head_channels: int
    ffn: int
    fc1_rows: int
    """Rows of the MLP's first projection: 2f for gated activations, else f."""

    @classmethod
    def of(cls, model: ModelConfig) -> "Dims":
        """Fill in the defaults of a model config.

        Raises:
            ConversionError: heads do not divide into query groups, or hidden size into heads without `kv_channels`.
        """
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        if heads % groups:
            raise ConversionError(
                f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}; "
                f"set num_query_groups to a divisor of {heads}"
            )
        if model.kv_channels is None and model.hidden_size % heads:
            raise ConversionError(
                f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads={heads}; "
                "change one of them or set model.kv_channels"
            )
        ffn = model.ffn_hidden_size or 4 * model.hidden_size
        return cls(
            hidden=model.hidden_size,
            heads=heads,
            groups=groups,
            head_channels=model.kv_channels or model.hidden_size // heads,
            ffn=ffn,
            fc1_rows=2 * ffn if model.activation in GATED_ACTIVATIONS else ffn,
        )


@lru_cache(maxsize=32)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    dims, shapes = Dims.of(model), dict[str, tuple[int, ...]]()
    query_rows = dims.heads * dims.head_channels
    qkv_rows = query_rows + 2 * dims.groups * dims.head_channels
    qkv_bias = model.add_bias_linear or model.add_qkv_bias

    def add(module: str, shape: tuple[int, ...], bias: bool) -> None:
        shapes[f"{module}.weight"] = shape
        if bias:
            shapes[f"{module}.bias"] = shape[:1]

    def add_norm(module: str) -> None:
        add(module, (dims.hidden,), bias=model.normalization == "LayerNorm")

    add("embedding.word_embeddings", (model.vocab_size, dims.hidden), bias=False)
    if model.position_embedding_type == "learned_absolute":
        add("embedding.position_embeddings", (model.max_position_embeddings, dims.hidden), bias=False)
    for i in range(model.num_layers):
        layer = f"layers.{i}"
        add_norm(f"{layer}.input_layernorm")
        add(f"{layer}.self_attention.linear_qkv", (qkv_rows, dims.hidden), bias=qkv_bias)
        add(f"{layer}.self_attention.linear_proj", (dims.hidden, query_rows), bias=model.add_bias_linear)
        add_norm(f"{layer}.pre_mlp_layernorm")
        add(f"{layer}.mlp.linear_fc1", (dims.fc1_rows, dims.hidden), bias=model.add_bias_linear)
        add(f"{layer}.mlp.linear_fc2", (dims.hidden, dims.ffn), bias=model.add_bias_linear)
    add_norm("final_norm")
    if model.untie_embeddings_and_output_weights:
        add("head", (model.vocab_size, dims.hidden), bias=False)
    return shapes


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All parameters of the model in the order of its layers: canonical name -> full shape.

    Raises:
        ConversionError: the sizes of the model contradict each other (see `Dims.of`).
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
    if missing := [name for name in wanted if name not in set(found)]:
        problems.append(f"lacks {shorten(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        problems.append(f"has {shorten(unknown)}, which this model does not know")
    if len(set(found)) != len(found):
        problems.append(f"lists {shorten([name for name in wanted if found.count(name) > 1])} more than once")
    if problems:
        raise ConversionError(f"{where} {' and '.join(problems)}; convert it with the model config it was made with")


def shorten(names: list[str], limit: int = 12) -> str:
    """Join names for a message; beyond `limit` only their number is told."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
