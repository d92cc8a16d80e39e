"""Shipped models have their published sizes, and every one of them plans with every shipped DeepSpeed config."""

import json
from pathlib import Path

import pytest

from megagpt.plan import load_deepspeed_config, load_preset, make_plan, preset_names, run_config_from_dict
from megagpt.plan.layout import count_active_parameters, count_parameters

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))

PUBLISHED_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt-neox-20b": 20_554_567_680,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
# Billions of parameters that a token meets, as published: arXiv 2401.04088, table 2; model card of Qwen3-30B-A3B, which
# cuts 3.35 off after one digit.
ACTIVE = {"mixtral-8x7b": (12.9, 0.05), "qwen3-30b-a3b": (3.3, 0.1)}

# name: (billions of parameters, TP, PP) in table 1 of arXiv 2104.04473
SC21 = {
    "megatron-1.7b": (1.7, 1, 1),
    "megatron-3.6b": (3.6, 2, 1),
    "megatron-7.5b": (7.5, 4, 1),
    "megatron-18.4b": (18.4, 8, 1),
    "megatron-39.1b": (39.1, 8, 2),
    "megatron-76.1b": (76.1, 8, 4),
    "megatron-145.6b": (145.6, 8, 8),
    "megatron-310.1b": (310.1, 8, 16),
    "megatron-529.6b": (529.6, 8, 35),
    "megatron-1t": (1008.0, 8, 64),
}
OTHER_LAYOUTS = {"gpt-neox-20b": (2, 4), "llama3-8b": (4, 1), "llama3-70b": (8, 4), "gpt3-175b": (8, 8)}


def run_of(name, tensor=1, pipeline=1):
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return run_config_from_dict({"model": {"preset": name}, "training": {"steps": 1}, "parallel": parallel})


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_exact_parameter_counts(name, parameters):
    assert count_parameters(run_of(name).model) == parameters


@pytest.mark.parametrize(("name", "published"), ACTIVE.items())
def test_active_parameters(name, published):
    billions, rounding = published
    assert count_active_parameters(run_of(name).model) / 1e9 == pytest.approx(billions, abs=rounding)


@pytest.mark.parametrize("name", SC21)
def test_sc21_models_have_the_formulas_size(name):
    model = run_of(name).model
    layers, hidden = model.num_layers, model.hidden_size
    vocab_and_positions = model.vocab_size + model.max_position_embeddings
    formula = layers * (12 * hidden**2 + 13 * hidden) + vocab_and_positions * hidden
    assert count_parameters(model) == formula + 2 * hidden  # the paper leaves out the final norm
    assert count_parameters(model) / 1e9 == pytest.approx(SC21[name][0], abs=0.05)


def test_gpt3_and_quickstart_sizes():
    assert count_parameters(run_of("gpt3-175b").model) / 1e9 == pytest.approx(175, abs=0.5)
    assert 5e6 < count_parameters(run_of("quickstart").model) < 7e6


def test_every_preset_is_checked_here():
    assert set(preset_names()) == {*PUBLISHED_PARAMETERS, *SC21, "gpt3-175b", "quickstart"}


@pytest.mark.parametrize("name", preset_names())
def test_presets_name_no_unknown_key(name):
    assert set(load_preset(name)) <= set(run_of(name).model.model_fields_set)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_with_every_deepspeed_config(name, path):
    deepspeed = load_deepspeed_config(path)
    tensor, pipeline = SC21[name][1:] if name in SC21 else OTHER_LAYOUTS.get(name, (1, 1))
    if deepspeed.zero_stage >= 2:
        pipeline = 1
    data = 2 if path.stem == "quickstart" else 8  # its batches are small
    plan = make_plan(run_of(name, tensor, pipeline), deepspeed, tensor * pipeline * data)
    assert (plan.data_parallel_size, plan.gradient_clipping) == (data, 1.0)
    assert plan.precision == ("bf16" if path.stem == "quickstart" else path.stem.split("_")[1])
    assert all("idles" in note or "fp32 (" in note for note in plan.notes)
    json.dumps(plan.engine_config())


def test_shipped_deepspeed_configs():
    assert [path.stem for path in DS_CONFIGS] == [
        "quickstart",
        "zero1_bf16",
        "zero1_bf16_offload",
        "zero1_fp16",
        "zero1_fp32",
        "zero2_bf16",
        "zero3_bf16",
        "zero3_bf16_offload",
    ]
    for path in DS_CONFIGS:
        stage = load_deepspeed_config(path).zero_stage
        assert path.stem == "quickstart" or path.stem.startswith(f"zero{stage}_")
