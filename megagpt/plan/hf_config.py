"""The keys of our `model` section from the config.json of a Hugging Face model.

What a key means when config.json lacks it is what transformers' classes say. A value that our model cannot express is
refused; values that play no part in the computation (token ids, cache, training of classifiers) are not looked at.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megagpt.errors import ConfigError

CONFIG_FILE = "config.json"
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


class _UnreadableError(Exception):
    """One problem with one key, worded without the file's name."""


class _Config(dict[str, Any]):
    """config.json, with errors that name keys."""

    def need(self, key: str) -> Any:
        if self.get(key) is None:
            raise _UnreadableError(f"{key} is missing; the file is not whole")
        return self[key]

    def among(self, key: str, names: Mapping[str, str], default: str) -> str:
        value = self.get(key) or default
        if value not in names:
            raise _UnreadableError(f"{key}={value!r} is not supported; it can be {', '.join(names)}")
        return names[value]

    def require(self, key: str, default: Any, *allowed: Any) -> None:
        value = self.get(key, default)
        if value not in allowed:
            raise _UnreadableError(f"{key}={value!r} is not supported; it can be {' or '.join(map(repr, allowed))}")


def read_hf_model(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """Family and model keys of a Hugging Face folder; `vocab_size` is the number of rows that its embedding has.

    Args:
        folder: a folder with config.json.

    Returns:
        transformers' `model_type`, and keys of the `model` section.

    Raises:
        ConfigError: config.json is missing or damaged, the family is unknown, or our model cannot express it.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); download or export the model again") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold an object, not {tree!r}")
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in _READERS:
        raise ConfigError(f"{path}: model_type={family!r} is not supported; it can be {', '.join(_READERS)}")
    config = _Config(tree)
    try:
        if config.get("quantization_config"):
            raise _UnreadableError("quantization_config is set; give the model that was not quantised")
        return family, _READERS[family](config)
    except _UnreadableError as problem:
        raise ConfigError(f"{path}: {problem}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: has a value of another type than transformers writes ({error})") from None


# ------------------------------------------------------------------------------------------------------- the llamas


def _rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise _UnreadableError(f"rope_scaling of type {kind!r} is not supported; it can be linear or llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    wanted = keys if kind == "llama3" else keys[:1]
    if missing := [key for key in wanted if key not in scaling]:
        raise _UnreadableError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    return {"type": kind, **{key: scaling[key] for key in wanted}}


def _rope(config: _Config, default_base: float = 10000.0) -> dict[str, Any]:
    """Base and scaling: transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`, which
    wins if both are there."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = parameters.get("rope_theta") or config.get("rope_theta") or default_base
    return {"rotary_base": float(base), "rotary_scaling": _rope_scaling(parameters)}


def _llama_like(config: _Config, tied: bool = False, epsilon: float = 1e-6) -> dict[str, Any]:
    heads, hidden = config.need("num_attention_heads"), config.need("hidden_size")
    return {
        "num_layers": config.need("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or hidden // heads,
        "ffn_hidden_size": config.need("intermediate_size"),
        "vocab_size": config.need("vocab_size"),
        "max_position_embeddings": config.need("max_position_embeddings"),
        "layernorm_epsilon": config.get("rms_norm_eps") or epsilon,
        "activation": config.among("hidden_act", _GATED, "silu"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", tied),
        **_rope(config),
        **_training_only(config),
    }


def _training_only(config: _Config) -> dict[str, Any]:
    found = {"init_method_std": config.get("initializer_range"), "attention_dropout": config.get("attention_dropout")}
    return {key: float(value) for key, value in found.items() if value is not None}


def _llama(config: _Config) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    keys = _llama_like(config)
    if config.get("mlp_bias", False):
        if not biased:
            raise _UnreadableError("mlp_bias=True with attention_bias=False is not supported")
        return keys | {"add_bias_linear": True}
    # The output projection has a bias too; one that is not zero is refused when the weights are read.
    return keys | {"add_qkv_bias": biased}


def _mistral(config: _Config) -> dict[str, Any]:
    window, kinds = config.get("sliding_window", 4096), set(config.get("layer_types") or ["sliding_attention"])
    if kinds == {"full_attention"}:
        window = None
    elif window is not None and kinds != {"sliding_attention"}:
        raise _UnreadableError("layers with and without a window (layer_types) are not supported in this family")
    return _llama_like(config) | {"sliding_window": window}


def _qwen_window(config: _Config, num_layers: int) -> dict[str, Any]:
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return {}
    if config.get("layer_types"):
        windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    else:
        windowed = [layer >= config.get("max_window_layers", 28) for layer in range(num_layers)]
    if not any(windowed):
        return {}
    if not all(windowed):
        raise _UnreadableError("layers with and without a window (max_window_layers) are not supported")
    return {"sliding_window": config.get("sliding_window", 4096)}


def _qwen2(config: _Config) -> dict[str, Any]:
    keys = _llama_like(config) | {"add_qkv_bias": True}
    return keys | _qwen_window(config, keys["num_layers"])


def _qwen3(config: _Config) -> dict[str, Any]:
    keys = _llama_like(config) | {"qk_layernorm": True, "add_qkv_bias": bool(config.get("attention_bias", False))}
    return keys | {"kv_channels": config.get("head_dim") or 128} | _qwen_window(config, keys["num_layers"])


# ---------------------------------------------------------------------------------------------------------- experts


def _mixtral(config: _Config) -> dict[str, Any]:
    keys = _llama_like(config, epsilon=1e-5) | _rope(config, 1_000_000.0)
    return keys | {
        "sliding_window": config.get("sliding_window"),
        "num_experts": config.get("num_local_experts") or config.get("num_experts") or 8,
        "moe_router_topk": config.get("num_experts_per_tok", 2),
        "moe_ffn_hidden_size": keys["ffn_hidden_size"],
        "moe_aux_loss_coeff": float(config.get("router_aux_loss_coef", 0.001)),
    }


def _qwen_experts(config: _Config, num_layers: int, experts: int, chosen: int) -> dict[str, Any]:
    dense, every = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    layers = tuple(int(layer not in dense and (layer + 1) % every == 0) for layer in range(num_layers))
    return {
        "num_experts": config.get("num_experts") or config.get("num_local_experts") or experts,
        "moe_router_topk": config.get("num_experts_per_tok", chosen),
        "moe_ffn_hidden_size": config.need("moe_intermediate_size"),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_aux_loss_coeff": float(config.get("router_aux_loss_coef", 0.001)),
        "moe_layer_freq": 1 if all(layers) else layers,
    }


def _qwen2_moe(config: _Config) -> dict[str, Any]:
    config.require("use_sliding_window", False, False, None)
    keys = _llama_like(config)
    return (
        keys
        | _qwen_experts(config, keys["num_layers"], experts=60, chosen=4)
        | {
            "add_qkv_bias": bool(config.get("qkv_bias", True)),
            "moe_shared_expert_intermediate_size": config.need("shared_expert_intermediate_size"),
            "moe_shared_expert_gate": True,
        }
    )


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    config.require("attention_bias", False, False, None)
    keys = _llama_like(config) | {"qk_layernorm": True}
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    return keys | _qwen_experts(config, keys["num_layers"], experts=128, chosen=8) | {"sliding_window": window}


# ----------------------------------------------------------------------------------------------------------- gemmas


def _gemma(config: _Config) -> dict[str, Any]:
    config.require("attention_bias", False, False, None)
    config.require("use_bidirectional_attention", None, False, None)
    keys = _llama_like(_Config(config, hidden_act="gelu_pytorch_tanh"), tied=True)
    # Early releases of Gemma say gelu and mean its approximation.
    said = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    if said not in ("gelu", "gelu_pytorch_tanh"):
        raise _UnreadableError(f"hidden_activation={said!r} is not supported; it can be gelu_pytorch_tanh")
    return keys | {
        "kv_channels": config.get("head_dim") or 256,
        "layernorm_zero_centered_gamma": True,
        "scale_embedding": True,
    }


def _windows(config: _Config, num_layers: int, every: int) -> dict[str, Any]:
    """Gemma 2 and 3: every so many layers one attends to all positions."""
    window = config.get("sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)]
    whole = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    if window is None or len(whole) == num_layers:
        return {}
    if not whole:
        return {"sliding_window": window}
    if whole != list(range(whole[0], num_layers + 1, whole[0])):
        raise _UnreadableError(f"layer_types={kinds} is not supported: full_attention must come every so many layers")
    return {"sliding_window": window, "window_attn_skip_freq": whole[0]}


def _gemma2(config: _Config) -> dict[str, Any]:
    return _sandwich(config, every=2, score_cap=50.0, logit_cap=30.0)


def _sandwich(config: _Config, every: int, score_cap: float | None, logit_cap: float | None) -> dict[str, Any]:
    keys = _gemma(config)
    return (
        keys
        | _windows(config, keys["num_layers"], every)
        | {
            "post_layernorms": True,
            "query_pre_attn_scalar": config.get("query_pre_attn_scalar", 256),
            "attn_logit_softcapping": config.get("attn_logit_softcapping", score_cap),
            "final_logit_softcapping": config.get("final_logit_softcapping", logit_cap),
        }
    )


def _gemma3(config: _Config) -> dict[str, Any]:
    ropes = config.get("rope_parameters") or {}
    whole, local = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
    if _rope_scaling(local) is not None:
        raise _UnreadableError("stretched rotary frequencies in layers with a window are not supported")
    config.require("attn_logit_softcapping", None, None)  # transformers has the key and does not heed it
    flat = _Config({key: value for key, value in config.items() if key != "rope_scaling"})
    flat["rope_parameters"] = {**whole, **(config.get("rope_scaling") or {})}
    keys = _sandwich(flat, config.get("sliding_window_pattern", 6), score_cap=None, logit_cap=None)
    base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    if keys.get("sliding_window") is not None:
        keys["rotary_base_local"] = float(base)
    return keys | _rope(flat, 1_000_000.0) | {"qk_layernorm": True}


# ------------------------------------------------------------------------------------------------- gpt2 and gpt_neox


def _gpt2(config: _Config) -> dict[str, Any]:
    config.require("scale_attn_weights", True, True)
    config.require("scale_attn_by_inverse_layer_idx", False, False)
    config.require("add_cross_attention", False, False)
    hidden = config.need("n_embd")
    found = {
        "init_method_std": config.get("initializer_range"),
        "hidden_dropout": config.get("resid_pdrop"),
        "attention_dropout": config.get("attn_pdrop"),
    }
    return {
        "num_layers": config.need("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": config.need("n_head"),
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden,
        "vocab_size": config.need("vocab_size"),
        "max_position_embeddings": config.need("n_positions"),
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation": config.among("activation_function", _PLAIN, "gelu_new"),
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        **{key: float(value) for key, value in found.items() if value is not None},
    }


def _gpt_neox(config: _Config) -> dict[str, Any]:
    config.require("attention_bias", True, True)
    rope = _rope(_Config(config, rope_theta=config.get("rotary_emb_base")))
    if rope["rotary_scaling"] is not None:
        raise _UnreadableError("rope_scaling is not supported in this family")
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor") or config.get("rotary_pct") or 0.25
    dropout = config.get("hidden_dropout")
    return {
        "num_layers": config.need("num_hidden_layers"),
        "hidden_size": config.need("hidden_size"),
        "num_attention_heads": config.need("num_attention_heads"),
        "ffn_hidden_size": config.need("intermediate_size"),
        "vocab_size": config.need("vocab_size"),
        "max_position_embeddings": config.need("max_position_embeddings"),
        **rope,
        "rotary_percent": float(share),
        "normalization": "LayerNorm",
        "layernorm_epsilon": config.get("layer_norm_eps", 1e-5),
        "activation": config.among("hidden_act", _PLAIN, "gelu"),
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "parallel_residual": bool(config.get("use_parallel_residual", True)),
        **_training_only(config),
        **({} if dropout is None else {"hidden_dropout": float(dropout)}),
    }


_READERS: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
