"""The report for people and for programs, and the command that prints both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.plan import (
    deepspeed_config_from_dict,
    describe,
    load_deepspeed_config,
    make_plan,
    plan_as_dict,
    run_config_from_dict,
)
from megagpt.plan.report import short_count, stage_contents

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan():
    tree = {
        "model": {"preset": "llama3-8b"},
        "training": {"steps": 1000, "recompute_granularity": "full"},
        "parallel": {
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 32,
            "sequence_parallel": True,
        },
    }
    raw = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 256)


def test_the_report_says_everything_once(plan):
    text = describe(plan)
    for words in (
        "llama3-8b: 8,030,261,248 parameters (8.03 B)",
        "vocabulary 128,256 (padded to 128,512)",
        "256 ranks = tensor 4 x pipeline 32 x data 2",
        "64 samples per step = micro-batch 2 x 16 micro-batches x data 2",
        "524,288 tokens per step = 64 samples x 8,192 tokens",
        "bf16 weights; gradients summed in fp32 and clipped to norm 1; ZeRO stage 1; adamw",
        "1,000 steps, 524 M tokens",
        "layers recomputed",
        "embedding, layer 0 ",
        "layer 31, final norm, head",
        "note: ZeRO stage 0 runs as stage 1",
        "note: 16 micro-batches for 32 pipeline stages: each stage idles 66% of the time",
    ):
        assert text.count(words) == 1, (words, text)


def test_the_report_tells_what_is_offloaded():
    run = run_config_from_dict({"model": {"preset": "llama3-8b"}, "training": {"steps": 1}})
    raw = {"train_batch_size": 8, "bf16": {"enabled": True}}
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    plan = make_plan(run, deepspeed_config_from_dict({**raw, "zero_optimization": zero}), 8)
    text = describe(plan)
    assert text.count("weights in host memory until a layer needs them") == 1
    assert text.count("master weights, moments and the update in host memory") == 1
    assert text.count(" host\n") == 1, "the table has a column for it"
    assert plan_as_dict(plan)["memory_per_stage"][0]["host"] == plan.memory.host == 22 * plan.num_parameters // 8
    assert plan.engine_config()["zero_force_ds_cpu_optimizer"] is False


def test_the_report_tells_what_is_on_a_disk():
    sections = {"model": {"preset": "llama3-8b"}, "training": {"steps": 1}, "checkpoint": {"directory": "checkpoints"}}
    raw = {"train_batch_size": 8, "bf16": {"enabled": True}}
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local_disk"}, "sub_group_size": 100}
    plan = make_plan(run_config_from_dict(sections), deepspeed_config_from_dict({**raw, "zero_optimization": zero}), 8)
    text = describe(plan)
    assert text.count("master weights and moments on a disk, the update in host memory") == 1
    assert text.count("note: training waits for each save: checkpoint.asynchronous=true would first copy") == 1
    assert text.count(" host         disk\n") == 1, "the table has columns for them"
    found = plan_as_dict(plan)["memory_per_stage"][0]
    assert found["disk"] == plan.memory.disk == 16 * plan.num_parameters // 8
    assert found["host"] == 4 * plan.num_parameters // 8 + 4 * 4 * 100, "gradients and buffers"


def test_the_report_tells_fp16s_loss_scale():
    run = run_config_from_dict({"model": {"preset": "quickstart"}, "training": {"steps": 1}})
    for fp16, words in (({}, "loss scale dynamic, from 65,536;"), ({"loss_scale": 128}, "loss scale always 128;")):
        raw = {"train_batch_size": 8, "fp16": {"enabled": True, **fp16}}
        assert describe(make_plan(run, deepspeed_config_from_dict(raw), 1)).count(words) == 1


def test_stage_contents(plan):
    assert stage_contents(plan, 0) == "embedding, layer 0"
    assert stage_contents(plan, 31) == "layer 31, final norm, head"
    single = make_plan(
        run_config_from_dict({"model": {"preset": "quickstart"}, "training": {"steps": 1}}),
        load_deepspeed_config(ROOT / "ds_configs" / "quickstart.json"),
        1,
    )
    assert stage_contents(single, 0) == "embedding, layers 0-4, final norm, head"


def test_dict_is_plain_and_restores_the_plan(plan):
    tree = json.loads(json.dumps(plan_as_dict(plan)))
    assert tree["data_parallel_size"] == 2
    assert tree["memory_per_stage"][0]["total"] == plan.memory_per_stage[0].total
    run = run_config_from_dict(tree["run"])
    assert run == plan.run
    # the engine's config repeats what was resolved, so that only the note on stage 0 is gone
    raw = {key: value for key, value in tree["engine_config"].items() if key != "steps_per_print"}
    again = make_plan(run, deepspeed_config_from_dict(raw), plan.world_size)
    assert again.memory_per_stage == plan.memory_per_stage
    assert again.engine_config() == plan.engine_config()


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1"), (999, "999"), (1500, "1.5 k"), (8.03e9, "8.03 B"), (1008e9, "1.01 T")]
)
def test_short_count(number, text):
    assert short_count(number) == text


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "plan.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_command(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {preset: quickstart}\ntraining: {steps: 100}\n")
    files = ("--config", config, "--deepspeed_config", "ds_configs/quickstart.json")
    text = run_tool(*files, "--world-size", "2", "training.steps=7")
    assert text.returncode == 0, text.stderr
    assert "\nrun        7 steps" in text.stdout
    tree = json.loads(run_tool(*files, "--json").stdout)
    assert (tree["world_size"], tree["run"]["training"]["steps"]) == (1, 100)
    wrong = run_tool(*files, "--world-size", "3", "training.seq_length=1000")
    assert wrong.returncode == 2
    lines = wrong.stderr.splitlines()
    starts = ("error: training.seq_length=1000", "error: ds_configs/quickstart.json:", "advice: nearest layout of 3")
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
