"""The tables against transformers' own classes and against an independent GPT."""

import json

import pytest
import torch
from convert_reference import GEMMA, GPT2, MODELS, NEOX, SIZES, ReferenceGPT, model_of, random_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.family import TokenIds
from megagpt.convert.tables import FAMILIES, family_for
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig

# With our tokenizer a model of Qwen2 becomes a Llama, which has no window.
AS_LLAMA = ("qwen2-gqa", "qwen2-tied-wide-heads")
ALL = [(name, tokenizer) for name in MODELS for tokenizer in (False, True) if not tokenizer or name in AS_LLAMA]


def to_hf_model(model: ModelConfig, weights: dict, own_tokenizer: bool, tmp_path) -> torch.nn.Module:
    """Have transformers load a folder of our tensors; none may be missing or unknown to it."""
    family = family_for(model, own_tokenizer)
    (tmp_path / "config.json").write_text(json.dumps(family.hf_config(model, TokenIds(1, 2, 3))))
    state = {name: family.to_hf(name, weights.__getitem__, model) for name in family.hf_names(model)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf_model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    return hf_model.eval()


@pytest.mark.parametrize(("name", "own_tokenizer"), ALL)
def test_transformers_computes_the_same_logits(name, own_tokenizer, tmp_path):
    model = model_of(name)
    weights = random_weights(model)
    tokens_BS = torch.randint(0, model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    expected_BSV = ReferenceGPT(model, weights)(tokens_BS)
    hf_model = to_hf_model(model, weights, own_tokenizer, tmp_path)
    with torch.inference_mode():
        logits_BSV = hf_model(tokens_BS).logits
    assert expected_BSV.std() > 0.5  # else the tolerance below would prove nothing
    assert (logits_BSV - expected_BSV).abs().max() <= 1e-5 * max(1, float(expected_BSV.abs().max()))


@pytest.mark.parametrize(("name", "own_tokenizer"), ALL)
def test_round_trip_is_bit_exact(name, own_tokenizer):
    model = model_of(name)
    weights = random_weights(model)
    family = family_for(model, own_tokenizer)
    assert family.name == ("llama" if own_tokenizer else MODELS[name][0])
    exported = {hf: family.to_hf(hf, weights.__getitem__, model) for hf in family.hf_names(model)}
    assert {hf: tuple(tensor.shape) for hf, tensor in exported.items()} == family.hf_shapes(model)
    family.check_hf(exported, exported.__getitem__, model, "export")
    for canonical in canonical_shapes(model):
        assert torch.equal(family.from_hf(canonical, exported.__getitem__, model), weights[canonical]), canonical


def test_gpt2_untied_keeps_its_own_head(tmp_path):
    model = model_of("gpt2-untied-gelu")
    weights = random_weights(model)
    hf_model = to_hf_model(model, weights, False, tmp_path)
    assert torch.equal(hf_model.lm_head.weight, weights["head.weight"])
    assert hf_model.transformer.wte.weight.data_ptr() != hf_model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("name", MODELS)
def test_config_is_the_same_for_old_and_new_readers(name):
    """transformers 4 reads flat rotary keys, transformers 5 `rope_parameters`."""
    model = model_of(name)
    config = family_for(model).hf_config(model, TokenIds(1, 2, 3), "bfloat16")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == 257
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    if model.position_embedding_type == "rope":
        flat, new = config.get("rope_theta", config.get("rotary_emb_base")), config["rope_parameters"]
        if "sliding_attention" in new:  # one per kind of layer
            assert config["rope_local_base_freq"] == new["sliding_attention"]["rope_theta"] == model.rotary_base_local
            new = new["full_attention"]
        assert flat == new["rope_theta"] == model.rotary_base
        assert config.get("rope_scaling", {}).items() <= new.items()
        share = new.get("partial_rotary_factor", 1.0)
        assert config.get("rotary_pct", 1.0) == share == model.rotary_percent


IMPOSSIBLE = {
    "partial rotary RMSNorm": ({"rotary_percent": 0.5}, {"llama": "model.rotary_percent=0.5"}),
    "grouped queries in GPT-2": (GPT2 | {"num_query_groups": 2}, {"gpt2": "model.num_query_groups=2"}),
    "grouped queries in NeoX": (NEOX | {"num_query_groups": 2}, {"gpt_neox": "model.num_query_groups=2"}),
    "wide heads in NeoX": (NEOX | {"kv_channels": 16}, {"gpt_neox": "model.kv_channels=16"}),
    "parallel llama": ({"parallel_residual": True}, {"llama": "model.parallel_residual=True"}),
    "LayerNorm without biases": (
        {"normalization": "LayerNorm", "activation": "gelu"},
        {"llama": "model.normalization=LayerNorm", "gpt2": "model.add_bias_linear=False"},
    ),
    "RMSNorm with learned positions": (
        {"position_embedding_type": "learned_absolute"},
        {"llama": "position_embedding_type=learned_absolute", "gpt2": "normalization=RMSNorm"},
    ),
    "a window in a biased Llama": (
        {"sliding_window": 8, "add_bias_linear": True},
        {"llama": "model.sliding_window=8 (can be null)", "mistral": "model.add_bias_linear=True (can be False)"},
    ),
    "a shared expert without a gate": (
        {"num_experts": 4, "moe_shared_expert_intermediate_size": 16},
        {
            "mixtral": "model.moe_shared_expert_intermediate_size=16 (can be null)",
            "qwen2_moe": "model.moe_shared_expert_gate=False (can be True)",
            "qwen3_moe": "model.qk_layernorm=False (can be True)",
            "llama": "model.num_experts=4 (can be null)",
        },
    ),
    "a dense layer in Mixtral": (
        {"num_experts": 4, "moe_layer_freq": 2},
        {"mixtral": "model.moe_layer_freq=2 (can be 1: all layers have experts)"},
    ),
    "normalised heads in NeoX": (NEOX | {"qk_layernorm": True}, {"gpt_neox": "model.qk_layernorm=True"}),
    "stretched NeoX": (
        NEOX | {"rotary_scaling": {"type": "linear", "factor": 2.0}},
        {"gpt_neox": "model.rotary_scaling={type='linear' factor=2.0"},
    ),
    "odd rotary": (NEOX | {"rotary_percent": 0.4}, {"gpt_neox": "3 rotated channels"}),
    "capped scores with normalised heads": (
        GEMMA | {"post_layernorms": True, "qk_layernorm": True, "attn_logit_softcapping": 2.0},
        {
            "gemma2": "model.qk_layernorm=True (can be False)",
            "gemma3_text": "model.attn_logit_softcapping=2.0 (can be null)",
        },
    ),
    "hidden not a multiple of heads": (
        {"num_attention_heads": 5, "kv_channels": 4, "add_bias_linear": True},
        {"llama": "model.hidden_size=24"},
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_model_without_counterpart_lists_the_keys(case):
    keys, expected = IMPOSSIBLE[case]
    with pytest.raises(ConversionError) as caught:
        family_for(ModelConfig(**(SIZES | keys)))
    lines = {line.split(":")[0].strip(): line for line in str(caught.value).splitlines()[1:]}
    assert set(lines) == {family.name for family in FAMILIES}
    for family, obstacle in expected.items():
        assert obstacle in lines[family]


def test_contradicting_sizes_are_refused():
    with pytest.raises(ConversionError, match=r"num_attention_heads=4 is not divisible by model.num_query_groups=3"):
        canonical_shapes(ModelConfig(**(SIZES | {"num_query_groups": 3})))


def test_wrong_shapes_and_unknown_names_are_refused():
    model = model_of("llama-gqa-tied")
    weights = random_weights(model)
    family = family_for(model)
    padded = weights | {"embedding.word_embeddings.weight": torch.zeros(384, 24)}
    with pytest.raises(ConversionError, match=r"\[384, 24\] where the model config says \[257, 24\]"):
        family.to_hf("model.embed_tokens.weight", padded.__getitem__, model)
    with pytest.raises(ConversionError, match=r"lm_head.weight is not a tensor"):
        family.to_hf("lm_head.weight", weights.__getitem__, model)
    with pytest.raises(ConversionError, match=r"head.weight is not a parameter"):
        family.from_hf("head.weight", weights.__getitem__, model)
    exported = {hf: family.to_hf(hf, weights.__getitem__, model) for hf in family.hf_names(model)}
    swapped = exported | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(24, 24)}
    with pytest.raises(ConversionError, match=r"k_proj.weight has shape \[24, 24\]"):
        family.from_hf("layers.0.self_attention.linear_qkv.weight", swapped.__getitem__, model)


def test_every_hf_tensor_is_accounted_for():
    model = model_of("llama")
    family = family_for(model)
    names = [*family.hf_names(model)[1:], "model.layers.0.self_attn.q_norm.weight"]
    with pytest.raises(ConversionError, match=r"lacks model.embed_tokens.weight and has .*q_norm.weight"):
        family.check_hf(names, lambda name: torch.zeros(1), model, "folder")


def test_a_bias_that_the_model_lacks_must_be_zero():
    model = model_of("qwen2-gqa")
    family = family_for(model, own_tokenizer=True)
    shapes = family.hf_shapes(model)
    assert shapes["model.layers.1.self_attn.o_proj.bias"] == (24,)
    family.check_hf(shapes, lambda name: torch.zeros(shapes[name]), model, "folder")
    with pytest.raises(ConversionError, match=r"folder: model.layers.0.self_attn.o_proj.bias is not zero"):
        family.check_hf(shapes, lambda name: torch.ones(shapes[name]), model, "folder")
