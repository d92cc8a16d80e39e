"""Exported folders: what they hold, how they appear and that transformers computes the same from them."""

import hashlib
import json
import multiprocessing
import os
import re

import pytest
import torch
from convert_reference import MODELS, SIZES, ReferenceGPT, model_of, random_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.forked import run_forked
from megagpt.convert.safetensors_stream import plan_shards, shard_names
from megagpt.convert.tables import family_for
from megagpt.convert.verify import compare_logits
from megagpt.convert.writer import MANIFEST, write_hf_folder
from megagpt.errors import ConversionError, DataError
from megagpt.plan.config import ModelConfig

TOKENS_BS = torch.randint(0, 257, (3, 32), generator=torch.Generator().manual_seed(2))


def export(folder, model, weights=None, **options):
    weights = weights or random_weights(model)
    options = {"tokenizer_path": None} | options
    return write_hf_folder(folder, model, weights.__getitem__, weights, **options)


def stored(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_export_computes_the_reference_logits(name, tmp_path):
    model = model_of(name)
    weights = random_weights(model)
    made = export(tmp_path / "out", model, weights)
    assert made.family == MODELS[name][0]
    report = compare_logits(tmp_path / "out", TOKENS_BS, ReferenceGPT(model, weights)(TOKENS_BS))
    report.require()
    assert report.top1_agreement == 1
    assert report.positions == 96


def test_files_and_manifest(tmp_path):
    model = model_of("llama-gqa-tied")
    made = export(tmp_path / "parent" / "out", model, card={"tokens seen": "1,000", "data": "a|b\nc"})
    names = {path.name for path in made.folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md", MANIFEST}
    manifest = json.loads((made.folder / MANIFEST).read_text())
    assert set(manifest["files"]) == names - {MANIFEST}
    for name, facts in manifest["files"].items():
        content = (made.folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["parameters"] == sum(tensor.numel() for tensor in stored(made.folder).values()) == made.parameters
    assert ModelConfig(**manifest["model"]) == model
    card = (made.folder / "README.md").read_text()
    assert "| tokens seen | 1,000 |" in card
    assert "| data | a\\|b c |" in card
    assert list(made.folder.parent.iterdir()) == [made.folder]  # nothing temporary is left


def test_shards_follow_the_index(tmp_path):
    model = model_of("gpt_neox")
    weights = random_weights(model)
    export(tmp_path / "one", model, weights)
    export(tmp_path / "many", model, weights, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files == shard_names(len(files)) == sorted(set(index["weight_map"].values()))
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in one.values())
    compare_logits(tmp_path / "many", TOKENS_BS, ReferenceGPT(model, weights)(TOKENS_BS)).require()


def test_several_processes_write_the_same_bytes(tmp_path):
    model = model_of("mixtral")
    weights = random_weights(model)
    for workers in (1, 3):
        export(tmp_path / f"by{workers}" / "out", model, weights, max_shard_bytes=20_000, workers=workers)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / f"by{n}" / "out").iterdir()} for n in (1, 3))
    assert one == three
    assert len(one) > 6


def test_no_more_processes_than_files_are_started(monkeypatch):
    started = []
    context = multiprocessing.get_context("fork")
    begin = context.Process.start
    monkeypatch.setattr(context.Process, "start", lambda process: (started.append(process), begin(process)))
    assert run_forked(lambda number: number + 1, [1, 2], workers=50) == [2, 3]
    assert len(started) == 2


def test_what_a_worker_meets_is_told(tmp_path):
    model = model_of("llama")
    weights = random_weights(model)
    weights["final_norm.weight"][3] = float("nan")
    with pytest.raises(ConversionError, match=r"model.norm.weight has values that are not finite"):
        export(tmp_path / "out", model, weights, max_shard_bytes=20_000, workers=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConversionError, match=r"workers=0 must be at least 1"):
        export(tmp_path / "out", model, workers=0)


def test_shard_plan_keeps_order_and_limit():
    shapes = {"a": (10,), "b": (10,), "huge": (100,), "c": (5,), "d": (15,), "e": (1,)}
    shards = plan_shards(shapes, torch.float32, 80)
    assert [list(shard) for shard in shards] == [["a", "b"], ["huge"], ["c", "d"], ["e"]]
    with pytest.raises(ConversionError, match=r"max_shard_bytes=0 must be at least 1"):
        plan_shards(shapes, torch.float32, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_are_rounded_once(dtype, tmp_path):
    model = model_of("gpt2-tied")
    weights = random_weights(model)
    made = export(tmp_path / "out", model, weights, dtype=dtype)
    family, torch_dtype = family_for(model), getattr(torch, dtype)
    for name, tensor in stored(made.folder).items():
        assert torch.equal(tensor, family.to_hf(name, weights.__getitem__, model).to(torch_dtype)), name
    rounded = {name: tensor.to(torch_dtype).float() for name, tensor in weights.items()}
    report = compare_logits(made.folder, TOKENS_BS, ReferenceGPT(model, rounded)(TOKENS_BS))
    report.require()  # exact in fp32 once the weights are rounded alike
    assert AutoModelForCausalLM.from_pretrained(made.folder, local_files_only=True).dtype == torch_dtype


def test_each_canonical_tensor_is_read_once(tmp_path):
    model = model_of("llama")
    weights, reads = random_weights(model), []
    write_hf_folder(tmp_path / "out", model, lambda name: reads.append(name) or weights[name], weights, None)
    assert reads == list(canonical_shapes(model))


def test_values_out_of_range_stop_the_export(tmp_path):
    model = model_of("llama")
    weights = random_weights(model)
    weights["final_norm.weight"][3] = 1e5
    with pytest.raises(ConversionError, match=r"model.norm.weight has the value 100000, beyond the range of float16"):
        export(tmp_path / "out", model, weights, dtype="float16")
    weights["final_norm.weight"][3] = float("nan")
    with pytest.raises(ConversionError, match=r"model.norm.weight has values that are not finite"):
        export(tmp_path / "out", model, weights)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_read_leaves_nothing_behind(tmp_path):
    model = model_of("llama")
    weights = random_weights(model)

    def read(name):
        if name == "final_norm.weight":
            raise KeyboardInterrupt
        return weights[name]

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(tmp_path / "out", model, read, weights, None)
    assert list(tmp_path.iterdir()) == []


def test_names_are_accounted_for(tmp_path):
    model = model_of("llama")
    weights = random_weights(model)
    names = [*list(weights)[1:], "layers.2.mlp.linear_fc2.weight", "head.weight"]
    expected = (
        "the model to export lacks embedding.word_embeddings.weight and has layers.2.mlp.linear_fc2.weight, "
        "which this model does not know and lists head.weight more than once"
    )
    with pytest.raises(ConversionError, match=re.escape(expected)):
        write_hf_folder(tmp_path / "out", model, weights.__getitem__, names, None)
    assert list(tmp_path.iterdir()) == []


def test_existing_targets(tmp_path):
    model = model_of("llama")
    old, new = random_weights(model, seed=1), random_weights(model, seed=2)
    export(tmp_path / "out", model, old)
    with pytest.raises(ConversionError, match=r"out exists; give another folder or allow overwriting"):
        export(tmp_path / "out", model, new)
    assert torch.equal(stored(tmp_path / "out")["model.norm.weight"], old["final_norm.weight"])
    export(tmp_path / "out", model, new, overwrite=True)
    assert torch.equal(stored(tmp_path / "out")["model.norm.weight"], new["final_norm.weight"])
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_only_our_exports_are_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ConversionError, match=r"precious is not an export of megagpt"):
        export(tmp_path / "precious", model_of("llama"), overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for name in ("file", "link"):
        with pytest.raises(ConversionError, match=rf"{name} is not a folder"):
            export(tmp_path / name, model_of("llama"), overwrite=True)


def test_the_old_export_comes_back_if_the_rename_fails(tmp_path, monkeypatch):
    model = model_of("llama")
    export(tmp_path / "out", model, random_weights(model, seed=1))
    rename, done = os.rename, []

    def failing(source, target):
        done.append(target)
        if len(done) == 2:  # the old one has stepped aside, the new one is to take its place
            raise OSError("disk trouble")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ConversionError, match=r"out cannot be written \(disk trouble\)"):
        export(tmp_path / "out", model, random_weights(model, seed=2), overwrite=True)
    expected = random_weights(model, seed=1)["final_norm.weight"]
    assert torch.equal(stored(tmp_path / "out")["model.norm.weight"], expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_target_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "out", tmp_path / ("long" * 62)):
        with pytest.raises(ConversionError, match=rf"{target.name} cannot be written \(.*; make room, or give another"):
            export(target, model_of("llama"))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_user_errors_come_before_any_work(tmp_path):
    with pytest.raises(ConversionError, match="no Hugging Face family"):
        export(tmp_path / "out", ModelConfig(**SIZES, rotary_percent=0.5))
    with pytest.raises(ConversionError, match=r"dtype=int8 is unknown"):
        export(tmp_path / "out", model_of("llama"), dtype="int8")
    with pytest.raises(DataError, match=r"missing\.model does not exist"):
        export(tmp_path / "out", model_of("llama"), tokenizer_path=tmp_path / "missing.model")
    assert list(tmp_path.iterdir()) == []
