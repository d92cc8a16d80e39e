"""The logits check must pass only what is equal, and stay quiet."""

import json

import pytest
import torch
from convert_reference import ReferenceGPT, model_of, random_weights
from safetensors.torch import load_file, save_file

from megagpt.convert.verify import LogitsReport, compare_logits
from megagpt.convert.writer import write_hf_folder
from megagpt.errors import ConversionError

TOKENS_BS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exported(tmp_path):
    """Folder and reference logits of a small model."""
    model = model_of("llama-gqa-tied")
    weights = random_weights(model)
    write_hf_folder(tmp_path / "out", model, weights.__getitem__, weights, None)
    return tmp_path / "out", ReferenceGPT(model, weights)(TOKENS_BS)


def test_report_measures_known_differences(exported):
    folder, reference_BSV = exported
    shifted_BSV = reference_BSV.clone()
    shifted_BSV[1, 4, 7] += 100.0  # now the top token of one position of 32
    report = compare_logits(folder, TOKENS_BS, shifted_BSV)
    assert report.max_difference == pytest.approx(100, abs=1e-3)
    assert report.mean_difference == pytest.approx(100 / shifted_BSV.numel(), rel=1e-2)
    assert report.top1_agreement == 31 / 32
    assert not report.passed
    with pytest.raises(ConversionError, match=r"other logits: largest difference 100 .*96.88% of 32 positions"):
        report.require()
    assert compare_logits(folder, TOKENS_BS, shifted_BSV, tolerance=101.0).passed


def test_a_wrong_weight_is_found(exported):
    folder, reference_BSV = exported
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(1, dims=0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not compare_logits(folder, TOKENS_BS, reference_BSV).passed


def test_not_a_number_never_passes(exported):
    folder, reference_BSV = exported
    reference_BSV[0, 0, 0] = float("nan")
    assert not compare_logits(folder, TOKENS_BS, reference_BSV, tolerance=1e9).passed


def test_missing_unknown_and_unreadable_weights(exported):
    folder, reference_BSV = exported
    tensors = load_file(folder / "model.safetensors")
    removed = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"missing_keys.*model.norm.weight"):
        compare_logits(folder, TOKENS_BS, reference_BSV)
    tensors |= {"model.norm.weight": removed, "model.layers.0.extra.weight": removed.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"unexpected_keys.*model.layers.0.extra.weight"):
        compare_logits(folder, TOKENS_BS, reference_BSV)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ConversionError, match=r"not a whole safetensors file"):
        compare_logits(folder, TOKENS_BS, reference_BSV)


def test_shapes_must_fit(exported, tmp_path):
    folder, reference_BSV = exported
    with pytest.raises(ConversionError, match=r"\[2, 16, 257\] where the reference has \[2, 16, 384\]"):
        compare_logits(folder, TOKENS_BS, torch.zeros(2, 16, 384))
    with pytest.raises(ConversionError, match=r"compare the same tokens"):
        compare_logits(folder, TOKENS_BS[:1], reference_BSV)
    with pytest.raises(ConversionError, match=r"no config.json"):
        compare_logits(tmp_path, TOKENS_BS, reference_BSV)


def test_a_folder_with_code_runs_none_of_it(exported):
    folder, reference_BSV = exported
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ConversionError, match=r"transformers cannot load it"):
        compare_logits(folder, TOKENS_BS, reference_BSV)
    assert not (folder / "ran").exists()


def test_nothing_is_printed(exported, capfd):
    compare_logits(*exported[:1], TOKENS_BS, exported[1])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_report_reads_as_a_sentence():
    report = LogitsReport(2e-6, 1e-7, 1.0, 1e-4, 96, "float32")
    assert str(report) == (
        "largest difference 2e-06 (tolerance 0.0001), mean 1e-07, same top token at 100.00% of 96 positions, float32"
    )
