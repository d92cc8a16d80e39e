"""A small GPT in plain torch over canonical tensors: an independent second opinion for the conversion tests.

Letters: B batch, S sequence, N query heads, G query groups, D channels per head, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.convert.canonical import canonical_shapes
from megagpt.plan.config import ModelConfig

SIZES = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 257, "max_position_embeddings": 32}
LAYERNORM = {"normalization": "LayerNorm", "add_bias_linear": True}
GPT2 = LAYERNORM | {"position_embedding_type": "learned_absolute", "activation": "gelu_tanh"}
NEOX = LAYERNORM | {
    "activation": "gelu",
    "parallel_residual": True,
    "rotary_percent": 0.5,
    "kv_channels": 8,
    "hidden_size": 32,
}

GEMMA = {
    "activation": "geglu_tanh",
    "layernorm_zero_centered_gamma": True,
    "scale_embedding": True,
    "untie_embeddings_and_output_weights": False,
}

# name -> (expected family, keys of the model)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-gqa-tied": ("llama", {"num_query_groups": 2, "untie_embeddings_and_output_weights": False}),
    "llama-mqa-wide-heads": ("llama", {"num_query_groups": 1, "kv_channels": 10, "ffn_hidden_size": 50}),
    "llama-biases-theta": ("llama", {"add_bias_linear": True, "rotary_base": 500000.0, "layernorm_epsilon": 1e-3}),
    "llama-geglu": ("llama", {"activation": "geglu"}),
    "qwen2-gqa": ("qwen2", {"add_qkv_bias": True, "num_query_groups": 2}),
    "qwen2-tied-wide-heads": (
        "qwen2",
        {"add_qkv_bias": True, "kv_channels": 8, "untie_embeddings_and_output_weights": False},
    ),
    "llama3-scaling": (
        "llama",
        {
            "num_query_groups": 2,
            "rotary_base": 50.0,
            "rotary_scaling": {
                "type": "llama3",
                "factor": 5.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "llama-linear-scaling": ("llama", {"rotary_scaling": {"type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {"num_query_groups": 2, "sliding_window": 5}),
    "mistral-tied-wide-window": (
        "mistral",
        {"sliding_window": 32, "kv_channels": 8, "untie_embeddings_and_output_weights": False},
    ),
    "mistral-any-heads": ("mistral", {"num_attention_heads": 5, "kv_channels": 4}),
    "qwen2-window": ("qwen2", {"add_qkv_bias": True, "sliding_window": 7}),
    "qwen3": ("qwen3", {"qk_layernorm": True, "num_query_groups": 2, "kv_channels": 8, "layernorm_epsilon": 1e-2}),
    "qwen3-tied-window-bias": (
        "qwen3",
        {
            "qk_layernorm": True,
            "add_qkv_bias": True,
            "sliding_window": 9,
            "untie_embeddings_and_output_weights": False,
        },
    ),
    "gemma-tied": ("gemma", GEMMA | {"num_query_groups": 1}),
    "gemma2-tied": (
        "gemma2",
        GEMMA
        | {
            "post_layernorms": True,
            "sliding_window": 6,
            "window_attn_skip_freq": 2,
            "query_pre_attn_scalar": 13,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
            "num_query_groups": 2,
        },
    ),
    "gemma2-untied-plain": ("gemma2", GEMMA | {"post_layernorms": True, "untie_embeddings_and_output_weights": True}),
    "gemma3-tied": (
        "gemma3_text",
        GEMMA
        | {
            "post_layernorms": True,
            "qk_layernorm": True,
            "sliding_window": 6,
            "window_attn_skip_freq": 2,
            "rotary_base": 1000.0,
            "rotary_base_local": 50.0,
            "rotary_scaling": {"type": "linear", "factor": 8.0},
        },
    ),
    "mixtral": ("mixtral", {"num_experts": 5, "moe_ffn_hidden_size": 20, "num_query_groups": 2}),
    "mixtral-tied-window": (
        "mixtral",
        {
            "num_experts": 3,
            "moe_router_topk": 3,
            "ffn_hidden_size": 36,
            "sliding_window": 7,
            "untie_embeddings_and_output_weights": False,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "moe_router_topk": 3, "moe_ffn_hidden_size": 28, "qk_layernorm": True, "kv_channels": 8},
    ),
    "qwen3_moe-dense-layer": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_ffn_hidden_size": 16,
            "ffn_hidden_size": 40,
            "moe_layer_freq": (0, 1),
            "moe_router_pre_softmax": True,
            "qk_layernorm": True,
            "untie_embeddings_and_output_weights": False,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 12,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 16,
            "moe_shared_expert_intermediate_size": 44,
            "moe_shared_expert_gate": True,
            "moe_router_pre_softmax": True,
            "add_qkv_bias": True,
            "moe_layer_freq": 2,
        },
    ),
    "gpt2-tied": ("gpt2", GPT2 | {"untie_embeddings_and_output_weights": False}),
    "gpt2-untied-gelu": ("gpt2", GPT2 | {"activation": "gelu", "ffn_hidden_size": 40}),
    "gpt2-relu": ("gpt2", GPT2 | {"activation": "relu", "add_qkv_bias": True}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential-full-rotary": (
        "gpt_neox",
        NEOX | {"parallel_residual": False, "rotary_percent": 1.0, "activation": "gelu_tanh", "rotary_base": 5000.0},
    ),
    "gpt_neox-tied-relu": ("gpt_neox", NEOX | {"activation": "relu", "untie_embeddings_and_output_weights": False}),
}


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**(SIZES | MODELS[name][1]))


def random_weights(model: ModelConfig, seed: int = 5) -> dict[str, Tensor]:
    """Canonical tensors large enough that a wrong order, bias or activation shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in canonical_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight") and not model.layernorm_zero_centered_gamma
        weights[name] = 1 + 0.3 * noise if is_norm else 0.3 * noise
    return weights


def _frequencies(model: ModelConfig, rotated: int, local: bool) -> Tensor:
    """Radians per position of each pair, one after the other as arXiv 2104.09864 and Llama 3.1 say."""
    frequencies = []
    base, scaling = (model.rotary_base_local, None) if local else (model.rotary_base, model.rotary_scaling)
    for pair in range(rotated // 2):
        frequency = base ** (-2 * pair / rotated)
        if scaling is not None and scaling.type == "linear":
            frequency /= scaling.factor
        elif scaling is not None:
            wavelength, length = 2 * torch.pi / frequency, scaling.original_max_position_embeddings
            longest, shortest = length / scaling.low_freq_factor, length / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                share = (length / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - share) * frequency / scaling.factor + share * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


def _rotated(x_BSND: Tensor, model: ModelConfig, rotated: int, local: bool) -> Tensor:
    """Rotate pairs (j, j + rotated/2) of the first `rotated` channels by complex multiplication."""
    half = rotated // 2
    frequency = _frequencies(model, rotated, local)
    angle = torch.arange(x_BSND.shape[1], dtype=torch.float64)[:, None, None] * frequency
    pairs = torch.complex(x_BSND[..., :half].double(), x_BSND[..., half:rotated].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real.float(), turned.imag.float(), x_BSND[..., rotated:]], dim=-1)


class ReferenceGPT:
    """Logits of a model from its canonical tensors, each query head computed by itself."""

    def __init__(self, model: ModelConfig, weights: dict[str, Tensor]):
        self.model, self.weights = model, weights
        self.heads = model.num_attention_heads
        self.groups = model.num_query_groups or self.heads
        self.channels = model.kv_channels or model.hidden_size // self.heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.model.normalization == "RMSNorm":
            scale = (x.pow(2).mean(-1, keepdim=True) + self.model.layernorm_epsilon).sqrt()
            return x / scale * (self.weights[f"{name}.weight"] + self.model.layernorm_zero_centered_gamma)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.model.layernorm_epsilon)

    def attention(self, index: int, x_BSH: Tensor) -> Tensor:
        layer = f"layers.{index}"
        windowed = self.model.sliding_window and (index + 1) % (self.model.window_attn_skip_freq or index + 2) != 0
        sequence, model, per_group = x_BSH.shape[1], self.model, self.heads // self.groups
        qkv = self.linear(f"{layer}.self_attention.linear_qkv", x_BSH).split(self.channels, dim=-1)
        outputs = []
        for head in range(self.heads):
            first = head // per_group * (per_group + 2)  # where this head's group begins
            q, k, v = qkv[first + head % per_group], qkv[first + per_group], qkv[first + per_group + 1]
            if model.qk_layernorm:
                q, k = (self.norm(f"{layer}.self_attention.{x}_layernorm", y) for x, y in (("q", q), ("k", k)))
            if model.position_embedding_type == "rope":
                rotated = int(self.channels * model.rotary_percent)
                local = bool(windowed and model.rotary_base_local)
                q, k = (_rotated(x[:, :, None], model, rotated, local)[:, :, 0] for x in (q, k))
            scores = q @ k.transpose(1, 2) / (model.query_pre_attn_scalar or self.channels) ** 0.5
            if model.attn_logit_softcapping:
                scores = model.attn_logit_softcapping * (scores / model.attn_logit_softcapping).tanh()
            distance = torch.arange(sequence)[:, None] - torch.arange(sequence)
            hidden = (distance < 0) | (distance >= (model.sliding_window if windowed else sequence))
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        return self.linear(f"{layer}.self_attention.linear_proj", torch.cat(outputs, dim=-1))

    def experts(self, mlp: str, x_BSH: Tensor) -> Tensor:
        """Each token by itself: what the chosen experts and the shared one say of it."""
        model, logits_BSE = self.model, self.linear(f"{mlp}.router", x_BSH)
        output_BSH = torch.zeros_like(x_BSH)
        for b, s in torch.cartesian_prod(*map(torch.arange, x_BSH.shape[:2])).tolist():
            logits, x = logits_BSE[b, s].double(), x_BSH[b, s]
            chosen = sorted(range(model.num_experts), key=lambda e: -logits[e])[: model.moe_router_topk]
            shares = logits.exp() / (logits.exp() if model.moe_router_pre_softmax else logits[chosen].exp()).sum()
            for expert in chosen:
                output_BSH[b, s] += shares[expert].float() * self.mlp(f"{mlp}.experts.{expert}", x)
        if model.moe_shared_expert_intermediate_size:
            gate = (x_BSH @ self.weights[f"{mlp}.shared_experts.gate_weight"].T).sigmoid()
            output_BSH = output_BSH + gate * self.mlp(f"{mlp}.shared_experts", x_BSH)
        return output_BSH

    def mlp(self, mlp: str, x: Tensor) -> Tensor:
        if f"{mlp}.router.weight" in self.weights:
            return self.experts(mlp, x)
        inner = self.linear(f"{mlp}.linear_fc1", x)
        kind = self.model.activation
        if "glu" in kind:
            gate, up = inner.chunk(2, dim=-1)
            approximate = "tanh" if "tanh" in kind else "none"
            inner = (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate=approximate)) * up
        else:
            inner = F.relu(inner) if kind == "relu" else F.gelu(inner, approximate="tanh" if "tanh" in kind else "none")
        return self.linear(f"{mlp}.linear_fc2", inner)

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        x = self.weights["embedding.word_embeddings.weight"][tokens_BS]
        if self.model.scale_embedding:
            x = x * self.model.hidden_size**0.5
        if self.model.position_embedding_type == "learned_absolute":
            x = x + self.weights["embedding.position_embeddings.weight"][: tokens_BS.shape[1]]
        for i in range(self.model.num_layers):
            layer = f"layers.{i}"
            output = self.attention(i, self.norm(f"{layer}.input_layernorm", x))
            if self.model.post_layernorms:
                output = self.norm(f"{layer}.post_self_attn_layernorm", output)
            attended = x + output
            mlp_input = x if self.model.parallel_residual else attended
            output = self.mlp(f"{layer}.mlp", self.norm(f"{layer}.pre_mlp_layernorm", mlp_input))
            if self.model.post_layernorms:
                output = self.norm(f"{layer}.post_mlp_layernorm", output)
            x = attended + output
        tied = self.weights["embedding.word_embeddings.weight"]
        logits, cap = (
            self.norm("final_norm", x) @ self.weights.get("head.weight", tied).T,
            self.model.final_logit_softcapping,
        )
        if cap:
            logits = cap * (logits / cap).tanh()
        return logits
