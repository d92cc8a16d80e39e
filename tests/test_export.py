"""From a checkpoint of TP2 x PP2 or CP2 x PP2 to a Hugging Face folder that computes and says the same."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from ranks import in_own_process, run_ranks
from tiny import ADAM, SGD, rank_batches, tiny_plan

from megagpt.errors import CheckpointError, ConversionError, DataError

pytestmark = pytest.mark.usefixtures("libraries")


def hf_model(folder: Path):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=["llama", "gpt2"])
def checkpoint(request, trained) -> Path:
    return trained(request.param)


@pytest.fixture
def llama_checkpoint(trained) -> Path:
    return trained("llama")


@in_own_process
def test_transformers_computes_the_logits_of_the_training_ranks(checkpoint, tmp_path):
    from megagpt.checkpoint import CheckpointReader, find_checkpoint
    from megagpt.export import export_checkpoint

    export = export_checkpoint(checkpoint, tmp_path / "hf")
    assert export.certificate.passed
    assert set(export.certificate.comparisons) == {"the checkpoint's model", "the training ranks"}
    # not only what the report says:
    tokens_BS, trained_BPV = CheckpointReader(find_checkpoint(checkpoint)).probe()
    with torch.no_grad():
        logits_BSV = hf_model(tmp_path / "hf")(tokens_BS).logits
    assert logits_BSV.shape[-1] == 300
    assert (logits_BSV[:, : trained_BPV.shape[1]] - trained_BPV).abs().max() < 1e-4
    assert trained_BPV.std() > 0.5, "the model has learnt something"


@in_own_process
def test_transformers_says_what_generate_says(checkpoint, tmp_path):
    from transformers import AutoTokenizer

    from megagpt.data.tokenizer import Tokenizer
    from megagpt.export import export_checkpoint
    from megagpt.generate import Sampling, generate, load_model

    export_checkpoint(checkpoint, tmp_path / "hf")
    ours, reader = load_model(checkpoint)
    tokenizer = Tokenizer.load(reader.run.data.tokenizer)
    theirs, hf_tokenizer = hf_model(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = set()
    for prompt in ("the tensor", "loss of", "gradient", " a"):
        ids = tokenizer.encode(prompt)
        expected = [*ids, *generate(ours, reader, tokenizer, prompt, 20, Sampling())]
        inputs = hf_tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
        assert [token for token in found if token != tokenizer.eod_id] == expected
        assert hf_tokenizer.decode(found, skip_special_tokens=True) == tokenizer.decode(expected)
        texts.add(tokenizer.decode(expected)[len(prompt) :])
    assert len(texts) > 1, "the prompt matters"


EXPERTS = {
    "mixtral": ("mixtral", {}, dict(tp=2, dp=2, ep=2, sp=True)),
    "qwen3_moe": (
        "mixtral",
        dict(qk_layernorm=True, num_layers=4, moe_layer_freq=[0, 1, 1, 0]),
        dict(pp=2, dp=2, ep=2),
    ),
    "qwen2_moe": ("shared_expert", dict(add_qkv_bias=True), dict(tp=2, dp=2, ep=2, sp=True)),
}


def save_after_one_step(plan) -> None:
    """A checkpoint after one large step."""
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    batches = rank_batches(plan, ranks.data_rank, 0)
    engine.train_step(batches, 0.1)
    checkpoints = Checkpoints(plan, engine, ranks, Console(ranks.rank, False))
    checkpoints.save(TrainState(1, 8, 1), {})
    checkpoints.wait()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_expert_and_tensor_parallel_ranks(family, tmp_path):
    base, keys, layout = EXPERTS[family]
    sections = {"model": keys | {"init_method_std": 0.1}, "checkpoint": {"directory": str(tmp_path / "checkpoints")}}
    plan = tiny_plan(base, SGD, sections=sections, **layout)
    run_ranks(save_after_one_step, 4, plan)
    [export] = run_ranks(export_it, 1, tmp_path / "checkpoints", tmp_path / "hf")
    assert export.family == family
    assert len(export.certificate.comparisons) == 2
    assert all(report.max_difference <= 1e-5 for report in export.certificate.comparisons.values())


def export_it(checkpoint: Path, folder: Path):
    from megagpt.export import export_checkpoint

    return export_checkpoint(checkpoint, folder)


def train_bf16_neox(folder: Path, dataset: dict) -> None:
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    sections = {"model": {"vocab_size": 300}, "data": dataset, "checkpoint": {"directory": str(folder)}}
    plan = tiny_plan("neox", ADAM, tp=2, pp=2, steps=3, precision="bf16", sections=sections)
    run(plan, detect_launch(), StopSignal())


@pytest.fixture(scope="module")
def bf16_checkpoint(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neox") / "checkpoints"
    run_ranks(train_bf16_neox, 4, folder, dataset)
    return folder


@in_own_process
def test_bf16_training_and_bf16_weights(bf16_checkpoint, tmp_path):
    from safetensors import safe_open

    from megagpt.export import export_checkpoint

    whole = export_checkpoint(bf16_checkpoint, tmp_path / "fp32")
    in_fp32, in_bf16 = whole.certificate.comparisons.values()
    assert in_fp32.max_difference < 1e-4, "both compute in fp32"
    assert in_bf16.max_difference < 0.05, "the ranks computed in bf16"
    half = export_checkpoint(bf16_checkpoint, tmp_path / "bf16", "bfloat16")
    assert half.certificate.passed
    assert half.weight_bytes < 0.55 * whole.weight_bytes
    with safe_open(tmp_path / "bf16" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["model_type"] == "gpt_neox"


TAMPERED = {
    "model.embed_tokens.weight": "the embedding",
    "model.layers.2.mlp.up_proj.weight": r"layer 2 \(counted from 0\)",
    "model.norm.weight": "the final norm or head",
}


@in_own_process
def test_an_export_with_other_weights_is_refused_and_names_the_layer(llama_checkpoint, tmp_path, monkeypatch):
    import safetensors.torch

    import megagpt.export as module

    export = module.export_checkpoint(llama_checkpoint, tmp_path / "hf")
    certificate = json.loads((tmp_path / "hf" / "certificate.json").read_text())
    assert certificate["passed"] is True
    assert certificate["largest_logit_difference"] < 1e-4
    assert certificate["sha256"]["model.safetensors"] == export.files["model.safetensors"].sha256
    assert {"megagpt", "torch", "transformers"} <= set(certificate["versions"])
    assert "| certificate | passed |" in (tmp_path / "hf" / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    for number, (name, where) in enumerate(TAMPERED.items()):

        class Tampered(module.LayerwiseTransformer):
            def __init__(self, folder, *memory, name=name):
                path = folder / "model.safetensors"
                weights = safetensors.torch.load_file(path)
                weights[name] *= -1
                safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
                super().__init__(folder, *memory)

        with monkeypatch.context() as patch:
            patch.setattr(module, "LayerwiseTransformer", Tampered)
            with pytest.raises(
                ConversionError, match=rf"differ from .*checkpoint's model: .* is in {where}; do not use"
            ):
                module.export_checkpoint(llama_checkpoint, tmp_path / "hf", overwrite=True)
        failed = tmp_path / ("hf.failed" + (f"-{number + 1}" if number else ""))
        assert json.loads((failed / "certificate.json").read_text())["passed"] is False
        assert "| certificate | FAILED: " in (failed / "README.md").read_text()
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before, "the good one is kept"


@in_own_process
def test_a_checkpoint_whose_weights_are_not_those_of_its_probe_is_refused(llama_checkpoint, tmp_path):
    """Checksums repaired, so that only the logits can tell."""
    import safetensors.torch

    from megagpt.checkpoint import find_checkpoint
    from megagpt.checkpoint.manifest import read_manifest, write_manifest
    from megagpt.checkpoint.tensor_file import write_tensors
    from megagpt.export import export_checkpoint

    folder = tmp_path / "step-00000001"
    shutil.copytree(find_checkpoint(llama_checkpoint), folder)
    path = folder / "rank-00000.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["weight/layers.0.mlp.linear_fc1.weight"][:64] *= -1
    manifest = read_manifest(folder)
    files = {**manifest.files, path.name: write_tensors(path, tensors)}
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    with pytest.raises(ConversionError, match=r"its logits differ from those of the training ranks"):
        export_checkpoint(folder, tmp_path / "hf")


@in_own_process
def test_damage_and_wrong_tokenizers_are_found_before_anything_is_written(llama_checkpoint, tmp_path):
    from megagpt.checkpoint import find_checkpoint
    from megagpt.data.tokenizer import train_sentencepiece
    from megagpt.export import export_checkpoint

    with pytest.raises(DataError, match=r"absent\.model does not exist"):
        export_checkpoint(llama_checkpoint, tmp_path / "hf", tokenizer=str(tmp_path / "absent.model"))
    train_sentencepiece(["other words than those of the dataset"] * 30, tmp_path / "other", vocab_size=280)
    with pytest.raises(ConversionError, match="has 280 tokens but the model 300; give the one that"):
        export_checkpoint(llama_checkpoint, tmp_path / "hf", tokenizer=str(tmp_path / "other.model"))
    copy = tmp_path / "step-00000001"
    shutil.copytree(find_checkpoint(llama_checkpoint), copy)
    with (copy / "rank-00002.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"rank-00002.safetensors: 1000 bytes, .*; use another checkpoint"):
        export_checkpoint(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".hf*"))


@in_own_process
def test_a_tokenizer_that_has_moved_away_is_asked_for(llama_checkpoint, tmp_path):
    import os

    from megagpt.checkpoint import find_checkpoint
    from megagpt.checkpoint.manifest import Manifest, write_manifest
    from megagpt.export import export_checkpoint

    copy = tmp_path / "step-00000001"
    shutil.copytree(find_checkpoint(llama_checkpoint), copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    tokenizer, manifest["run"]["data"]["tokenizer"] = manifest["run"]["data"]["tokenizer"], "data/tokenizer.model"
    write_manifest(copy, Manifest.model_validate(manifest))
    os.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"data/tokenizer\.model of the run does not exist, seen from .*give --tokenizer"
    ):
        export_checkpoint(copy, tmp_path / "hf")
    export_checkpoint(copy, tmp_path / "hf", tokenizer=tokenizer)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
