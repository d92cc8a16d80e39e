"""Model keys from config.json of a Hugging Face folder, and what contradicts them."""

import json

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import run_config_from_dict

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 149,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.fixture
def folder(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return str(tmp_path)

    return write


def run_of(folder, **model):
    return run_config_from_dict({"model": {"init_from": folder, **model}, "training": {"steps": 3}})


def test_sizes_come_from_the_folder(folder):
    run = run_of(folder())
    model = run.model
    assert (model.num_layers, model.hidden_size, model.num_query_groups, model.kv_channels) == (3, 48, 2, 8)
    assert model.rotary_base == 500000.0
    assert model.rotary_scaling.factor == 8.0
    assert model.untie_embeddings_and_output_weights
    assert run.training.seq_length == 64


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_a_rotary_base_that_is_not_given_is_that_of_transformers(family, tmp_path):
    from transformers import AutoConfig

    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    theirs = theirs.get("full_attention", theirs)
    assert run_of(str(tmp_path)).model.rotary_base == theirs["rope_theta"]


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers(folder):
    parameters = {"rope_type": "default", "rope_theta": 700.0}
    model = run_of(folder(rope_parameters=parameters)).model
    assert model.rotary_scaling.factor == 8.0
    assert model.rotary_base == 500000.0
    with pytest.raises(ConfigError, match="rope_scaling of type 'dynamic' is not supported"):
        run_of(folder(rope_parameters=parameters, rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    nested = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    linear = {"rope_type": "linear", "factor": 4.0}
    model = run_of(folder(model_type="gemma3_text", rope_parameters=nested, rope_scaling=linear)).model
    assert (model.rotary_base, model.rotary_base_local, model.rotary_scaling.factor) == (700.0, 50.0, 4.0)


def test_layers_that_all_see_everything_have_no_window(folder):
    assert run_of(folder(model_type="mistral", layer_types=["full_attention"] * 3)).model.sliding_window is None


def test_what_changes_no_logit_may_differ(folder):
    model = run_of(
        folder(), num_layers=3, vocab_size=160, hidden_dropout=0.1, init_method_std=0.01, max_position_embeddings=128
    ).model
    assert (model.vocab_size, model.hidden_dropout, model.max_position_embeddings) == (160, 0.1, 128)


def test_contradictions_name_both_values(folder):
    where = folder()
    with pytest.raises(ConfigError) as caught:
        run_of(where, num_layers=4, activation="geglu", rotary_base=10000.0)
    assert len(caught.value.problems) == 3
    message = str(caught.value)
    assert f"model.num_layers=4 but model.init_from={where} has 3; remove model.num_layers" in message
    assert "model.activation=geglu but" in message
    assert "model.rotary_base=10000.0 but" in message
    with pytest.raises(ConfigError, match=r"model.num_layers=5 but .* has 3"):
        run_of(where, preset="quickstart")


def test_a_dumped_config_needs_no_folder(folder, tmp_path):
    run = run_of(folder())
    tree = run.model_dump(mode="json")
    (tmp_path / "config.json").unlink()
    assert run_config_from_dict(tree) == run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5"}, r"model_type='t5' is not supported; it can be llama, mistral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"of type 'llama3' lacks low_freq_factor"),
        ({"hidden_act": "relu"}, r"hidden_act='relu' is not supported; it can be silu"),
        ({"hidden_size": None}, r"hidden_size is missing"),
        ({"quantization_config": {"bits": 4}}, r"give the model that was not quantised"),
        ({"num_attention_heads": 0}, r"has a value of another type"),
        ({"model_type": "gpt2", "n_embd": 8, "scale_attn_by_inverse_layer_idx": True}, r"layer_idx=True is not"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, r"with and without a window"),
        ({"model_type": "mistral", "layer_types": WINDOWS}, r"with and without a window \(layer_types\)"),
        ({"model_type": "gemma3_text", "rope_scaling": None, "attn_logit_softcapping": 2.0}, r"softcapping=2.0 is not"),
    ],
)
def test_what_cannot_be_expressed_is_refused(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        run_of(folder(**changes))


def test_no_folder_and_no_json(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: cannot be read .*give the folder of a Hugging Face model"):
        run_of(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: is not JSON"):
        run_of(str(tmp_path))
