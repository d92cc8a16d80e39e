"""The DeepSpeed JSON: what is read, what is refused, and that our list of its keys is DeepSpeed's."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, load_deepspeed_config
from megagpt.plan.deepspeed_config import DEFAULT_GRADIENT_CLIPPING
from megagpt.plan.deepspeed_keys import OFFLOAD_KEYS, REFUSED_KEYS, SECTION_KEYS, TOP_LEVEL_KEYS


def test_what_is_read():
    raw = {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "data_types": {"grad_accum_dtype": "bf16"},
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": False,
    }
    config = deepspeed_config_from_dict(raw)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (8, None)
    assert (config.zero_stage, config.precision, config.grad_accum_dtype) == (2, "bf16", "bf16")
    assert config.gradient_clipping == 0.5
    assert config.raw == raw
    raw["zero_optimization"]["stage"] = 3
    assert config.raw["zero_optimization"]["stage"] == 2


def test_what_an_empty_config_means():
    config = deepspeed_config_from_dict({})
    assert (config.zero_stage, config.precision, config.grad_accum_dtype) == (0, "fp32", None)
    assert config.gradient_clipping == 1.0


def test_gradients_are_sent_in_the_type_of_the_weights_unless_another_is_given():
    bf16 = {"bf16": {"enabled": True}}
    types = [
        deepspeed_config_from_dict({**bf16, **more}).communication_data_type
        for more in ({}, {"communication_data_type": None}, {"communication_data_type": "FP32"})
    ]
    assert types == ["bf16", "bf16", "fp32"]


def test_loss_scale_of_fp16():
    dynamic = deepspeed_config_from_dict({"fp16": {"enabled": True}})
    assert (dynamic.precision, dynamic.loss_scale_is_dynamic, dynamic.initial_loss_scale) == ("fp16", True, 65536.0)
    fixed = deepspeed_config_from_dict({"fp16": {"enabled": True, "loss_scale": 128}})
    assert (fixed.loss_scale_is_dynamic, fixed.initial_loss_scale) == (False, 128.0)


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_both_names_of_bf16(name):
    assert deepspeed_config_from_dict({name: {"enabled": True}}).precision == "bf16"
    assert deepspeed_config_from_dict({name: {"enabled": False}}).precision == "fp32"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer: the optimizer belongs in the run config's `optimizer:` section"),
        ({"scheduler": {}}, "scheduler: the schedule belongs in the run config's `optimizer:` section"),
        ({"activation_checkpointing": {}}, "training.recompute_granularity"),
        ({"expert_parallel": {}}, "set by parallel.expert_model_parallel_size in the run config"),
        ({"amp": {}}, "DeepSpeed has removed it; use bf16"),
        ({"train_batchsize": 4}, "train_batchsize: unknown key; did you mean train_batch_size?"),
        ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge: unknown key; did you mean stage?"),
        ({"zero_optimization": True}, "zero_optimization=True must be an object"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "offload_param.devise: unknown key; did you",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=True must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm must be true"),
        ({"data_types": {"grad_accum_dtyp": "fp32"}}, "did you mean grad_accum_dtype?"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "must be one of fp32, bf16, fp16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "does not go with fp32 weights; use fp32"),
        ({"data_types": {"param_dtype": "bf16"}}, "contradicts the precision fp32"),
        ({"communication_data_type": "float32"}, "communication_data_type='float32' must be one of fp32, bf16, fp16; "),
        ({"communication_data_type": 16}, "communication_data_type=16 must be one of fp32, bf16, fp16; write one"),
        ({"communication_data_type": "auto"}, 'communication_data_type="auto" has nobody to fill it in'),
        (
            {"seq_parallel_communication_data_type": "int8"},
            "seq_parallel_communication_data_type='int8' must be one of",
        ),
        ({"pipeline": {"stages": 4}}, "pipeline.stages: unknown key"),
        ({"train_batch_size": "auto"}, 'train_batch_size="auto" has nobody to fill it in'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size="auto"'),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled="auto"'),
        ({"train_batch_size": 0}, "train_batch_size=0 must be a positive integer"),
        ({"gradient_accumulation_steps": 1.0}, "gradient_accumulation_steps=1.0 must be a positive integer"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled=1 must be true or false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both true; keep bf16"),
        ({"bf16": {}, "bfloat16": {}}, "the same section; keep bf16"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "keeps no fp32 master weights"),
        ({"bfloat16": {"bf16_master_weights_and_grads": True}}, "bfloat16.bf16_master_weights_and_grads=True keeps no"),
        ({"bf16": {"bf16_optimizer_states": True}}, "keeps moments in bf16"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale=-1 must be a number of at least 0"),
        ({"fp16": {"loss_scale": True}}, "fp16.loss_scale=True must be a number"),
        ({"fp16": {"initial_scale_power": 33}}, "must be a whole number from 0 to 32"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window=0 must be a whole number of at least 1"),
        ({"fp16": {"hysteresis": 1.0}}, "fp16.hysteresis=1.0 must be a whole number from 1 to 16"),
        ({"gradient_clipping": -1}, "gradient_clipping=-1 must be a number of at least 0"),
        ({"gradient_clipping": None}, "gradient_clipping=None must be a number of at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping=nan must be a number of at least 0"),
        ({"gradient_allreduce_op": "sum"}, 'use "mean"'),
        ({"managed_gradient_accumulation": False}, "must be true"),
    ],
)
def test_each_wrong_key_gets_one_sentence(raw, words):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config_from_dict(raw, source="ds.json")
    (problem,) = caught.value.problems
    assert problem.startswith("ds.json: ")
    assert words in problem


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        deepspeed_config_from_dict({"optimizer": {}, "trian_batch_size": 1, "gradient_clipping": "x"})
    assert len(caught.value.problems) == 3


def test_deepspeeds_own_auto_is_allowed():
    deepspeed_config_from_dict({"data_types": {"keep_in_fp32_modules": "auto"}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_size": 4,\n  }', "not valid JSON at line "),
        ('{"bf16": {"enabled": true, "enabled": false}}', "key 'enabled' appears twice; keep one"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_broken_files(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_config(path)
    (problem,) = caught.value.problems
    assert problem.startswith(str(path))
    assert words in problem


def test_absent_and_undecodable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_deepspeed_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_deepspeed_config(tmp_path / "bad.json")


def test_file_is_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 4}))
    config = load_deepspeed_config(path)
    assert (config.source, config.train_batch_size) == (str(path), 4)


def deepspeed_source(relative):
    """Parse a file of the installed DeepSpeed; importing it would take seconds."""
    spec = importlib.util.find_spec("deepspeed")
    return ast.parse((Path(spec.origin).parent / relative).read_text())


def fields_of_class(tree, name):
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = set()
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            fields.add(node.target.id)
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            fields |= {keyword.value.value for keyword in keywords if keyword.arg == "alias"}
    return fields


@pytest.mark.parametrize(
    ("section", "path", "class_name"),
    [
        ("zero_optimization", "runtime/zero/config.py", "DeepSpeedZeroConfig"),
        ("offload_param", "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
        ("offload_optimizer", "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
        ("bf16", "runtime/precision_config.py", "DeepSpeedBF16Config"),
        ("fp16", "runtime/precision_config.py", "DeepSpeedFP16Config"),
    ],
)
def test_sections_have_deepspeeds_keys(section, path, class_name):
    assert fields_of_class(deepspeed_source(path), class_name) == set({**SECTION_KEYS, **OFFLOAD_KEYS}[section])


def test_removed_keys_and_defaults_are_deepspeeds():
    values = {}
    for tree in (deepspeed_source("runtime/config.py"), deepspeed_source("runtime/constants.py")):
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = node.value
    removed = {key.value for key in values["_REMOVED_TOP_LEVEL_CONFIG_KEYS"].keys}
    assert removed <= set(REFUSED_KEYS)
    assert values["GRADIENT_CLIPPING_DEFAULT"].value == DEFAULT_GRADIENT_CLIPPING
    not_keys = {"MAX_GRAD_NORM", "TYPE", "OPTIMIZER_PARAMS", "SCHEDULER_PARAMS", "LEGACY_FUSION"}
    known = {*TOP_LEVEL_KEYS, *REFUSED_KEYS}
    # constants of scalar keys that DeepSpeed reads at the top level: each has a ..._DEFAULT companion
    checked = 0
    sections = ("BFLOAT16_", "FP16_", "CHECKPOINT_", "TORCH_AUTOCAST_", "GRAD_ACCUM", "PARAM_DTYPE", "BUFFER_DTYPE")
    for name, value in values.items():
        if f"{name}_DEFAULT" not in values or name in not_keys or name.startswith(sections):
            continue
        if isinstance(value, ast.Constant) and name not in NESTED_KEYS:
            assert value.value in known, name
            checked += 1
    assert checked > 10


NESTED_KEYS = {
    "ADAM_W_MODE",
    "CHECK_OVERFLOW",
    "KEEP_IN_FP32_MODULES",
    "LOAD_UNIVERSAL_CHECKPOINT",
    "OPTIMIZER_TYPE",
    "SCHEDULER_TYPE",
    "USE_NODE_LOCAL_STORAGE_CHECKPOINT",
}
