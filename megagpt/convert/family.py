"""What a Hugging Face family is: reshapings of tensors, rows that join our modules to theirs, and the config.

Every reshaping is a permutation of elements, so a round trip is bit-exact. Shape letters: see `canonical.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from megagpt.convert.canonical import canonical_shapes, check_names, shorten
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig, Section

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
    transposes: bool = False
    """Weights are stored [in, out]. Apart from that all reshapings permute rows."""


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
CONV1D = Reshaping(lambda model, tensor: (_transposed(tensor),), lambda model, parts: _transposed(parts[0]), True)
CONV1D_QKV = Reshaping(
    lambda model, tensor: (_transposed(torch.cat(_split_qkv(model, tensor))),), _join_conv1d_qkv, True
)


@dataclass(frozen=True)
class Row:
    """One of our modules and the Hugging Face modules made of it; `{i}` stands for the layer, `{e}` for the expert.

    `canonical` may also be the name of a parameter that is neither `.weight` nor `.bias`; it becomes a `.weight`.
    """

    canonical: str
    hf: tuple[str, ...]
    reshaping: Reshaping = SAME


@dataclass(frozen=True)
class Source:
    """Where one Hugging Face tensor comes from: part `part` of a split canonical tensor."""

    canonical: str | None  # None: zeros, because the family demands a bias that the model does not have
    shape: tuple[int, ...]  # of the Hugging Face tensor
    reshaping: Reshaping = SAME
    part: int = 0


# --------------------------------------------------------------------------------------------------------- families

ANY: tuple[Any, ...] = ()
"""No values listed in `Family.requires`: the family expresses all."""

FEATURES: Mapping[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,),
    "rotary_scaling": (None,),
    "rotary_base_local": (None,),
    "sliding_window": (None,),
    "window_attn_skip_freq": (None,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "post_layernorms": (False,),
    "scale_embedding": (False,),
    "parallel_residual": (False,),
    "num_experts": (None,),
    "moe_shared_expert_intermediate_size": (None,),
}
"""Values of keys that most families cannot express otherwise: what `Family.requires` says about them wins."""


@dataclass(frozen=True, eq=False)
class Family:
    """A Hugging Face architecture: what it can express, its config and its tensors.

    `requires` lists the values allowed for a key of the model config, on top of FEATURES; `checks` covers what needs
    several keys and returns one phrase per obstacle. `zeros` names modules of a layer whose bias the family demands
    although the model has none; it is written as zeros, which changes no logit. `brings_tokenizer`: transformers'
    AutoTokenizer loads every folder of this family with the family's own tokenizer, whatever the folder's tokenizer
    files say.
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
        for key, allowed in {**FEATURES, **self.requires}.items():
            value = getattr(model, key)
            if allowed and value not in allowed:
                found.append(f"model.{key}={_shown(value)} (can be {' or '.join(map(_shown, allowed))})")
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
        parts = self.parts_of(canonical, model)
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

    def sources(self, model: ModelConfig) -> dict[str, Source]:
        """Where each tensor of a saved Hugging Face model comes from, in the order of the model's layers.

        Raises:
            ConversionError: a parameter of the model has no place in this family.
        """
        return dict(_sources(self, model))

    def parts_of(self, canonical: str, model: ModelConfig) -> list[tuple[str, Source]]:
        """Names and sources of the Hugging Face tensors that are made of one canonical tensor, in order.

        Raises:
            ConversionError: the model has no such parameter.
        """
        parts = _parts(self, model).get(canonical)
        if not parts:
            raise ConversionError(f"{canonical} is not a parameter of this model config")
        return parts

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


def odd_rotary(model: ModelConfig) -> list[str]:
    """The obstacle of rotated channels that do not pair up, which no family allows."""
    rotated = int(model.kv_channels * model.rotary_percent)
    return [] if rotated % 2 == 0 and rotated else [f"{rotated} rotated channels per head (must be even, not zero)"]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return f"{{{value}}}" if isinstance(value, Section) else str(value)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ConversionError(
            f"{name} has shape {list(tensor.shape)} where the model config says {list(expected)}; "
            "use the config that the model was trained with (vocabulary without padding)"
        )


@lru_cache(maxsize=32)
def _sources(family: Family, model: ModelConfig) -> dict[str, Source]:
    """Hugging Face name -> source, in the order of the canonical names."""
    sources = dict[str, Source]()
    rows = {row.canonical: row for row in family.rows}
    without_bias = family.zeros(model)
    unmapped = []
    for canonical, shape in canonical_shapes(model).items():
        module, _, kind = canonical.rpartition(".")
        template, layer, expert = _template(module)
        row = rows.get(template)
        if row is None and (row := rows.get(f"{template}.{kind}")) is not None:
            kind = "weight"
        if row is None:
            unmapped.append(canonical)
            continue
        parts = row.reshaping.split(model, torch.empty(shape, device="meta"))
        assert len(parts) == len(row.hf), row
        for part, (hf_module, tensor) in enumerate(zip(row.hf, parts, strict=True)):
            hf_name = f"{hf_module.format(i=layer, e=expert)}.{kind}"
            sources[hf_name] = Source(canonical, tuple(tensor.shape), row.reshaping, part)
            if kind == "weight" and hf_module in without_bias:
                sources[f"{hf_module.format(i=layer, e=expert)}.bias"] = Source(None, (tensor.shape[0],))
    if unmapped:
        raise ConversionError(f"the {family.name} family has no place for {shorten(unmapped)}")
    return sources


@lru_cache(maxsize=32)
def _parts(family: Family, model: ModelConfig) -> dict[str, list[tuple[str, Source]]]:
    """Canonical name -> the Hugging Face tensors made of it, in order."""
    parts = dict[str, list[tuple[str, Source]]]()
    for name, source in _sources(family, model).items():
        if source.canonical is not None:
            parts.setdefault(source.canonical, []).append((name, source))
    return parts


_NUMBERED = re.compile(r"^layers\.(\d+)\.(?:(mlp\.experts)\.(\d+)\.)?")


def _template(module: str) -> tuple[str, str, str]:
    """A module's name with `{i}` and `{e}` in place of its numbers, and these numbers ("" where there is none)."""
    match = _NUMBERED.match(module)
    if match is None:
        return module, "", ""
    layer, experts, expert = match.groups()
    rest = module[match.end() :]
    return f"layers.{{i}}.{experts}.{{e}}.{rest}" if experts else f"layers.{{i}}.{rest}", layer, expert or ""
