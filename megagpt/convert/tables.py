"""Which Hugging Face family expresses a model, and how each of its tensors is made.

One table per family. A row joins one of our modules to the Hugging Face modules that hold the same numbers, together
with the reshaping; it counts for `.weight` and `.bias` alike. Every reshaping is a permutation of elements, so a round
trip is bit-exact. Shape letters: see `canonical.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from megagpt.convert.canonical import canonical_shapes, check_names
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig

Read = Callable[[str], Tensor]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokenizer's special tokens, as far as it has them."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


# ------------------------------------------------------------------------------------------------------- reshapings


@dataclass(frozen=True)
class Reshaping:
    """`split` makes the Hugging Face tensors of one canonical tensor, `join` is its inverse."""

    split: Callable[[ModelConfig, Tensor], tuple[Tensor, ...]]
    join: Callable[[ModelConfig, tuple[Tensor, ...]], Tensor]


def _split_qkv(model: ModelConfig, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[(n+2g)d, ...] in Megatron's order -> query [nd, ...], key [gd, ...], value [gd, ...], heads in order."""
    rest = qkv.shape[1:]
    per_group = qkv.reshape(
        model.num_query_groups, model.num_attention_heads // model.num_query_groups + 2, model.kv_channels, *rest
    )  # g, n/g + 2, d
    query, key, value = per_group[:, :-2], per_group[:, -2], per_group[:, -1]
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def _join_qkv(model: ModelConfig, parts: tuple[Tensor, ...]) -> Tensor:
    """Inverse of `_split_qkv`."""
    rest = parts[0].shape[1:]
    grouped = [part.reshape(model.num_query_groups, -1, model.kv_channels, *rest) for part in parts]  # g, n/g or 1, d
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _transposed(tensor: Tensor) -> Tensor:
    """Weight [out, in] <-> GPT-2's Conv1D weight [in, out]; a bias stays as it is."""
    return tensor.t() if tensor.dim() == 2 else tensor


def _join_conv1d_qkv(model: ModelConfig, parts: tuple[Tensor, ...]) -> Tensor:
    """GPT-2's c_attn, [h, 3nd] or [3nd] with all queries first -> Megatron's order."""
    return _join_qkv(model, _transposed(parts[0]).chunk(3, dim=0))


SAME = Reshaping(lambda model, tensor: (tensor,), lambda model, parts: parts[0])
QKV = Reshaping(_split_qkv, _join_qkv)
GATE_UP = Reshaping(lambda model, tensor: tensor.chunk(2, dim=0), lambda model, parts: torch.cat(parts, dim=0))
CONV1D = Reshaping(lambda model, tensor: (_transposed(tensor),), lambda model, parts: _transposed(parts[0]))
CONV1D_QKV = Reshaping(lambda model, tensor: (_transposed(torch.cat(_split_qkv(model, tensor))),), _join_conv1d_qkv)


@dataclass(frozen=True)
class Row:
    """One of our modules and the Hugging Face modules made of it; `{i}` stands for the layer."""

    canonical: str
    hf: tuple[str, ...]
    reshaping: Reshaping = SAME


@dataclass(frozen=True)
class _Source:
    """Where one Hugging Face tensor comes from: part `part` of a split canonical tensor."""

    canonical: str | None  # None: zeros, because the family demands a bias that the model does not have
    shape: tuple[int, ...]  # of the Hugging Face tensor
    reshaping: Reshaping = SAME
    part: int = 0


# --------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True, eq=False)
class Family:
    """A Hugging Face architecture: what it can express, its config and its tensors.

    `requires` lists the values allowed for a key of the model config; `checks` covers what needs several keys and
    returns one sentence per obstacle. `zeros` names modules of a layer whose bias the family demands although the
    model has none; it is written as zeros, which changes no logit. `brings_tokenizer`: transformers' AutoTokenizer
    loads every folder of this family with the family's own tokenizer, whatever the folder's tokenizer files say.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    requires: Mapping[str, tuple[Any, ...]]
    checks: Callable[[ModelConfig], list[str]]
    config: Callable[[ModelConfig], dict[str, Any]]
    zeros: Callable[[ModelConfig], tuple[str, ...]] = lambda model: ()
    brings_tokenizer: bool = False

    def obstacles(self, model: ModelConfig) -> list[str]:
        """What keeps this family from expressing the model exactly: one phrase per key; empty if it fits."""
        found = []
        for key, allowed in self.requires.items():
            value = getattr(model, key)
            if value not in allowed:
                found.append(f"model.{key}={value} (can be {' or '.join(map(str, allowed))})")
        return found + self.checks(model)

    def hf_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that a saved Hugging Face model has (tied heads are not saved).

        Raises:
            ConversionError: a parameter of the model has no place in this family.
        """
        return {name: source.shape for name, source in _sources(self, model).items()}

    def hf_names(self, model: ModelConfig) -> list[str]:
        """Names of `hf_shapes`, in the order of the model's layers."""
        return list(_sources(self, model))

    def to_hf(self, name: str, read: Read, model: ModelConfig) -> Tensor:
        """Make one Hugging Face tensor.

        Args:
            name: one of `hf_names(model)`.
            read: gives the full canonical tensor of a name.

        Raises:
            ConversionError: the name is unknown, or a canonical tensor has another shape than the model config says.
        """
        source = _sources(self, model).get(name)
        if source is None:
            raise ConversionError(f"{name} is not a tensor of the {self.name} family for this model config")
        if source.canonical is None:
            return torch.zeros(source.shape)
        tensor = read(source.canonical)
        _check_shape(source.canonical, tensor, canonical_shapes(model)[source.canonical])
        return source.reshaping.split(model, tensor)[source.part].contiguous()

    def from_hf(self, canonical: str, read_hf: Read, model: ModelConfig) -> Tensor:
        """Make one canonical tensor: the inverse of `to_hf`.

        Args:
            canonical: a key of `canonical_shapes(model)`.
            read_hf: gives the tensor of a Hugging Face name.

        Raises:
            ConversionError: the name is unknown, or a Hugging Face tensor has another shape than the config says.
        """
        parts = [(name, source) for name, source in _sources(self, model).items() if source.canonical == canonical]
        if not parts:
            raise ConversionError(f"{canonical} is not a parameter of this model config")
        tensors = []
        for name, source in parts:
            tensors.append(read_hf(name))
            _check_shape(name, tensors[-1], source.shape)
        return parts[0][1].reshaping.join(model, tuple(tensors)).contiguous()

    def check_hf(self, names: Iterable[str], read_hf: Read, model: ModelConfig, where: str) -> None:
        """Account for every tensor of a Hugging Face folder before `from_hf`.

        Args:
            names: tensor names found there.
            read_hf: gives the tensor of a Hugging Face name; called only for biases that the model does not have.
            where: the folder or file, for the message.

        Raises:
            ConversionError: names are missing or unknown, or a bias that the model lacks is not zero.
        """
        check_names(names, self.hf_names(model), where)
        for name, source in _sources(self, model).items():
            if source.canonical is None and bool(read_hf(name).any()):
                raise ConversionError(f"{where}: {name} is not zero but this model config has no such bias")

    def hf_config(self, model: ModelConfig, tokens: TokenIds, dtype: Dtype = "float32") -> dict[str, Any]:
        """Content of config.json, read alike by transformers 4 and 5.

        Dropout after the embedding, attention and MLP has no key in the llama and qwen2 families; it plays no part
        in inference.
        """
        special = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            **self.config(model),
            "initializer_range": model.init_method_std,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            # Written even when null: the families' own defaults are ids of other tokenizers.
            **special,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,  # transformers 4
        }


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ConversionError(
            f"{name} has shape {list(tensor.shape)} where the model config says {list(expected)}; "
            "use the config that the model was trained with (vocabulary without padding)"
        )


@lru_cache(maxsize=32)
def _sources(family: Family, model: ModelConfig) -> dict[str, _Source]:
    """Hugging Face name -> source, in the order of the canonical names."""
    sources = dict[str, _Source]()
    rows = {row.canonical: row for row in family.rows}
    unmapped = []
    for canonical, shape in canonical_shapes(model).items():
        module, _, kind = canonical.rpartition(".")
        layer = module.split(".")[1] if module.startswith("layers.") else ""
        row = rows.get(module.replace(f"layers.{layer}.", "layers.{i}.", 1) if layer else module)
        if row is None:
            unmapped.append(canonical)
            continue
        parts = row.reshaping.split(model, torch.empty(shape, device="meta"))
        assert len(parts) == len(row.hf), row
        for part, (hf_module, tensor) in enumerate(zip(row.hf, parts, strict=True)):
            hf_name = f"{hf_module.format(i=layer)}.{kind}"
            sources[hf_name] = _Source(canonical, tuple(tensor.shape), row.reshaping, part)
            if kind == "weight" and hf_module in family.zeros(model):
                sources[f"{hf_module.format(i=layer)}.bias"] = _Source(None, (tensor.shape[0],))
    if unmapped:
        raise ConversionError(f"the {family.name} family has no place for {', '.join(unmapped)}")
    return sources


# ------------------------------------------------------------------------------------------------- llama and qwen2


def _llama_rows() -> tuple[Row, ...]:
    hf, ours = "model.layers.{i}", "layers.{i}"
    attention = tuple(f"{hf}.self_attn.{part}_proj" for part in "qkv")
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.input_layernorm",)),
        Row(f"{ours}.self_attention.linear_qkv", attention, QKV),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.self_attn.o_proj",)),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.post_attention_layernorm",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"), GATE_UP),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.down_proj",)),
        Row("final_norm", ("model.norm",)),
        Row("head", ("lm_head",)),
    )


_LLAMA_REQUIRES: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "activation": ("swiglu", "geglu"),
    "parallel_residual": (False,),
}


def _even_rotary(model: ModelConfig) -> list[str]:
    rotated = int(model.kv_channels * model.rotary_percent)
    return [] if rotated % 2 == 0 and rotated else [f"{rotated} rotated channels per head (must be even, not zero)"]


def _llama_checks(model: ModelConfig) -> list[str]:
    found = _even_rotary(model)
    if model.hidden_size % model.num_attention_heads:
        found.append(f"model.hidden_size={model.hidden_size} (must be a multiple of num_attention_heads)")
    return found


def _llama_zeros(model: ModelConfig) -> tuple[str, ...]:
    """Llama's attention has biases in all four projections or in none."""
    only_qkv = model.add_qkv_bias and not model.add_bias_linear
    return ("model.layers.{i}.self_attn.o_proj",) if only_qkv else ()


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu" if model.activation == "swiglu" else "gelu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,  # transformers 4
        "attention_dropout": model.attention_dropout,
        "attention_bias": model.has_qkv_bias,
        "mlp_bias": model.add_bias_linear,
    }


def _qwen2_config(model: ModelConfig) -> dict[str, Any]:
    config = _llama_config(model)
    for fixed_by_the_family in ("attention_bias", "mlp_bias"):
        del config[fixed_by_the_family]
    return config | {"use_sliding_window": False}


# ------------------------------------------------------------------------------------------------------------ gpt2

_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def _gpt2_rows() -> tuple[Row, ...]:
    hf, ours = "transformer.h.{i}", "layers.{i}"
    return (
        Row("embedding.word_embeddings", ("transformer.wte",)),
        Row("embedding.position_embeddings", ("transformer.wpe",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.ln_1",)),
        Row(f"{ours}.self_attention.linear_qkv", (f"{hf}.attn.c_attn",), CONV1D_QKV),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.attn.c_proj",), CONV1D),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.ln_2",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.c_fc",), CONV1D),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.c_proj",), CONV1D),
        Row("final_norm", ("transformer.ln_f",)),
        Row("head", ("lm_head",)),
    )


def _plain_heads(model: ModelConfig) -> list[str]:
    """GPT-2 and GPT-NeoX have one key/value head per query head, and heads that fill the hidden size."""
    found = []
    if model.num_query_groups != model.num_attention_heads:
        found.append(
            f"model.num_query_groups={model.num_query_groups} (must be num_attention_heads={model.num_attention_heads})"
        )
    if model.num_attention_heads * model.kv_channels != model.hidden_size:
        found.append(
            f"model.kv_channels={model.kv_channels} (times num_attention_heads={model.num_attention_heads} must give "
            f"hidden_size={model.hidden_size})"
        )
    return found


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": _HF_ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.layernorm_epsilon,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


# -------------------------------------------------------------------------------------------------------- gpt_neox


def _gpt_neox_rows() -> tuple[Row, ...]:
    hf, ours = "gpt_neox.layers.{i}", "layers.{i}"
    return (
        Row("embedding.word_embeddings", ("gpt_neox.embed_in",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.input_layernorm",)),
        # With as many groups as heads, Megatron's order is NeoX's: query, key and value head by head.
        Row(f"{ours}.self_attention.linear_qkv", (f"{hf}.attention.query_key_value",)),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.attention.dense",)),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.post_attention_layernorm",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.dense_h_to_4h",)),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.dense_4h_to_h",)),
        Row("final_norm", ("gpt_neox.final_layer_norm",)),
        Row("head", ("embed_out",)),
    )


def _gpt_neox_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": _HF_ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_percent,
        },
        "rotary_emb_base": model.rotary_base,  # transformers 4
        "rotary_pct": model.rotary_percent,  # transformers 4
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }


# -------------------------------------------------------------------------------------------------- the four tables

_BIASED_LAYERNORM: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": tuple(_HF_ACTIVATIONS),
    "add_bias_linear": (True,),
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _llama_rows(),
        _LLAMA_REQUIRES | {"add_qkv_bias": (True,), "add_bias_linear": (False,)},
        _even_rotary,
        _qwen2_config,
        brings_tokenizer=True,
    ),
    Family("llama", "LlamaForCausalLM", _llama_rows(), _LLAMA_REQUIRES, _llama_checks, _llama_config, _llama_zeros),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _gpt2_rows(),
        _BIASED_LAYERNORM | {"position_embedding_type": ("learned_absolute",), "parallel_residual": (False,)},
        _plain_heads,
        _gpt2_config,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _gpt_neox_rows(),
        _BIASED_LAYERNORM | {"position_embedding_type": ("rope",)},
        lambda model: _plain_heads(model) + _even_rotary(model),
        _gpt_neox_config,
    ),
)


def family_for(model: ModelConfig, own_tokenizer: bool = False) -> Family:
    """The first family that expresses the model exactly.

    Args:
        own_tokenizer: the folder will hold our tokenizer, so families that bring their own are passed over.

    Raises:
        ConversionError: none does; the message lists per family the keys that stand in the way.
    """
    obstacles = {}
    for family in FAMILIES:
        found = family.obstacles(model)
        if own_tokenizer and family.brings_tokenizer:
            found.append("transformers replaces the tokenizer of this family by another one")
        if not found:
            return family
        obstacles[family.name] = found
    lines = [f"  {name}: {'; '.join(found)}" for name, found in obstacles.items()]
    raise ConversionError(
        "no Hugging Face family expresses this model exactly; to export, train with keys that one of them allows:\n"
        + "\n".join(lines)
    )
