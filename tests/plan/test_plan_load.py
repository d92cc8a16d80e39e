"""Run configs: files, overrides, presets, defaults, and errors in the user's words."""

import errno
from pathlib import Path

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import load_deepspeed_config, load_preset, load_run_config, run_config_from_dict

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 32}


def small_tree(**sections):
    return {"model": dict(SMALL), "training": {"steps": 10}, **sections}


def problems_of(tree):
    with pytest.raises(ConfigError) as caught:
        run_config_from_dict(tree, source="run.yaml")
    return caught.value.problems


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: quickstart}\ntraining: {steps: 100}\noptimizer: {lr: 1e-3}\n")
    return path


def test_defaults_of_other_keys_are_filled_in():
    run = run_config_from_dict(small_tree())
    assert (run.model.num_query_groups, run.model.kv_channels, run.model.ffn_hidden_size) == (4, 16, 256)
    assert (run.training.seq_length, run.optimizer.decay_steps) == (32, 10)


def test_null_asks_for_the_default():
    tree = small_tree(optimizer=None, logging={"interval": None})
    tree["model"]["kv_channels"] = None
    run = run_config_from_dict(tree)
    assert run == run_config_from_dict(small_tree())


def test_dump_round_trips_even_without_the_preset_file(tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text("".join(f"{key}: {value}\n" for key, value in SMALL.items()))
    run = run_config_from_dict({"model": {"preset": str(preset)}, "training": {"steps": 3}})
    preset.unlink()
    assert run_config_from_dict(run.model_dump(mode="json")) == run


def test_the_tree_given_is_left_alone():
    tree = small_tree()
    run_config_from_dict(tree)
    assert tree == small_tree()


def test_file_and_overrides(run_yaml):
    overrides = ["training.steps=7", "optimizer.min_lr=1e-5", "data.split=[8, 1, 1]", "model.num_layers=3"]
    run = load_run_config(run_yaml, overrides)
    assert run.model.num_layers == 3
    assert run.model.hidden_size == 256  # from the preset
    assert (run.training.steps, run.optimizer.decay_steps) == (7, 7)
    assert (run.optimizer.lr, run.optimizer.min_lr) == (1e-3, 1e-5)
    assert run.data.split == (8, 1, 1)


def test_override_can_choose_the_preset(run_yaml):
    assert load_run_config(run_yaml, ["model.preset=gpt2-124m"]).model.vocab_size == 50257


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.5e-4", "-2e+5", "1_0e2", "3e4"])
def test_exponents_are_numbers(tmp_path, text):
    (tmp_path / "preset.yaml").write_text(f"value: {text}\n")
    assert load_preset(str(tmp_path / "preset.yaml"))["value"] == float(text.replace("_", ""))


@pytest.mark.parametrize("text", ["e5", "1e", "12", "1e5f", "0x1e5"])
def test_other_texts_do_not_become_floats(tmp_path, text):
    (tmp_path / "preset.yaml").write_text(f"value: {text}\n")
    assert not isinstance(load_preset(str(tmp_path / "preset.yaml"))["value"], float)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("training..steps=3", "not of the form section.key=value"),
        ("training.steps=[1", "not valid YAML"),
        ("training.steps.deep=3", "training.steps=100 has no keys below it"),
        ("training.stepz=3", "training.stepz: unknown key; did you mean steps?"),
        ("training.steps=3e1", "training.steps=30.0 must be an integer"),
    ],
)
def test_wrong_overrides(run_yaml, override, words):
    with pytest.raises(ConfigError) as caught:
        load_run_config(run_yaml, [override])
    (problem,) = caught.value.problems
    assert words in problem
    assert str(run_yaml) in problem


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("model", "num_layers", "twelve", "model.num_layers='twelve' must be an integer"),
        ("model", "num_layers", True, "model.num_layers=True must be an integer"),
        ("model", "num_layers", 0, "model.num_layers=0 must be at least 1"),
        ("model", "num_layrs", 3, "model.num_layrs: unknown key; did you mean num_layers?"),
        ("model", "activation", "silu", "model.activation='silu' must be one of 'swiglu'"),
        ("model", "rotary_percent", 1.5, "model.rotary_percent=1.5 must be at most 1"),
        ("model", "hidden_dropout", 1.0, "model.hidden_dropout=1.0 must be less than 1"),
        ("model", "hidden_size", 66, "model.hidden_size=66 is not divisible by model.num_attention_heads=4; use"),
        ("model", "steps", 3, "model.steps: unknown key; did you mean training.steps?"),
        ("training", "micro_batch_size", 3, "belong in the DeepSpeed JSON"),
        ("training", "zero_optimization", {}, "belong in the DeepSpeed JSON"),
        ("optimizer", "lr", "fast", "optimizer.lr='fast' must be a number"),
        ("optimizer", "lr", float("inf"), "optimizer.lr=inf must be a number"),
        ("optimizer", "lr", -1, "optimizer.lr=-1 must be greater than 0"),
        ("parallel", "sequence_parallel", "yes", "must be true or false"),
        ("data", "prefix", 7, "data.prefix=7 must be text"),
        ("parallel", "pipeline_partition", "even", "parallel.pipeline_partition='even' must be uniform, parameters"),
        ("parallel", "pipeline_partition", [3, -1], "parallel.pipeline_partition=[3, -1] must be uniform"),
        ("data", "split", [1, 2], "data.split=[1, 2] must be a list of three numbers"),
        ("data", "split", [1, 2, 3, 4], "data.split=[1, 2, 3, 4] must be a list of three numbers"),
        ("data", "split", "90,5,5", "data.split='90,5,5' must be a list of three numbers"),
    ],
)
def test_each_wrong_value_gets_one_sentence(section, key, value, words):
    tree = small_tree()
    tree.setdefault(section, {})[key] = value
    (problem,) = problems_of(tree)
    assert problem.startswith("run.yaml: ")
    assert words in problem


def test_all_problems_are_reported_at_once():
    tree = {"model": {**SMALL, "num_layers": "x", "colour": 1}, "training": {}, "modl": {}, "logging": 3, 5: 6}
    problems = problems_of(tree)
    for words in ("num_layers='x'", "model.colour: unknown key; known keys:", "training.steps is missing", "model?"):
        assert any(words in problem for problem in problems), (words, problems)
    assert any("logging=3 must be a section" in problem for problem in problems)
    assert any("5: unknown key" in problem for problem in problems)
    assert len(problems) == 6


def test_derived_keys_are_not_blamed_for_their_sources():
    tree = small_tree()
    del tree["model"]["hidden_size"], tree["model"]["max_position_embeddings"], tree["training"]["steps"]
    assert sorted(problem.split()[1] for problem in problems_of(tree)) == [
        "model.hidden_size",
        "model.max_position_embeddings",
        "training.steps",
    ]


def test_missing_sections():
    assert problems_of({}) == [
        "run.yaml: section `model:` is missing; add it",
        "run.yaml: section `training:` is missing; add it",
    ]


def test_unknown_preset_lists_the_shipped_ones():
    (problem,) = problems_of({"model": {"preset": "llama9"}, "training": {"steps": 1}})
    assert "model.preset='llama9' is not a shipped model; use one of " in problem
    assert "quickstart" in problem


def test_unknown_preset_is_an_error_even_if_nothing_is_missing():
    (problem,) = problems_of({"model": {"preset": "llama9", **SMALL}, "training": {"steps": 1}})
    assert "model.preset='llama9'" in problem


def test_presets_do_not_nest(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("preset: quickstart\n")
    with pytest.raises(ConfigError, match="a preset cannot name a preset"):
        load_preset(str(preset))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model:\n  a: 1\n  a: 2\n", "line 3, column 3: key 'a' appears twice; keep one"),
        (b"model: [1\n", "line 2, column 1: "),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- 1\n", "must hold `key: value` lines"),
        (b"model: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"", "section `model:` is missing; add it"),
    ],
)
def test_broken_files(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert words in caught.value.problems[0]
    assert caught.value.problems[0].startswith(str(path))


def test_absent_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path / "none.yaml")


def test_a_section_within_a_section_is_checked_key_by_key():
    scaling = {"type": "llama3", "factor": 0.5, "low_freq": 1.0}
    tree = {"model": {"preset": "llama3.2-1b", "rotary_scaling": scaling}, "training": {"steps": 1}}
    with pytest.raises(ConfigError) as caught:
        run_config_from_dict(tree)
    factor, unknown = caught.value.problems
    assert "model.rotary_scaling.factor=0.5 must be at least 1" in factor
    assert "model.rotary_scaling.low_freq: unknown key; did you mean low_freq_factor?" in unknown


def test_llama3_scaling_has_published_defaults():
    tree = {"model": {"preset": "llama3-8b", "rotary_scaling": {"type": "llama3", "factor": 8.0}}}
    model = run_config_from_dict({**tree, "training": {"steps": 1}}).model
    assert model.rotary_scaling == run_config_from_dict(
        {"model": {"preset": "llama3.1-8b"}, "training": {"steps": 1}}
    ).model.rotary_scaling  # fmt: skip


def test_a_file_system_that_is_away_may_come_back(monkeypatch):
    def read_text(self, **_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", read_text)
    for load in (load_run_config, load_deepspeed_config):
        with pytest.raises(ConfigError, match="Stale file handle") as caught:
            load("there.yaml")
        assert caught.value.exit_code == 75
