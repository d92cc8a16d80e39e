"""A Hugging Face folder becomes a checkpoint that any layout goes on from, and comes back bit for bit."""

from pathlib import Path

import pytest
import torch
import yaml
from ranks import in_own_process
from safetensors.torch import load_file, save_file

from megagpt.errors import ConversionError, DataError
from megagpt.plan import run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")

CASES = {
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=9, query_pre_attn_scalar=20),
    "gpt2": dict(n_positions=40, n_embd=48, n_layer=2, n_head=6),
}
SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80)


def write_hf_model(folder: Path, family: str, dtype: torch.dtype) -> None:
    import transformers

    sizes = CASES[family] | ({} if family == "gpt2" else SIZES | dict(max_position_embeddings=40))
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(family, vocab_size=521, initializer_range=0.1, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size="60KB")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", CASES)
@in_own_process
def test_there_and_back_again(family, tmp_path):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.export import export_checkpoint
    from megagpt.generate import load_model, model_logits
    from megagpt.import_hf import import_checkpoint

    write_hf_model(tmp_path / "hf", family, torch.bfloat16)
    made = import_checkpoint(tmp_path / "hf", tmp_path / "made")
    assert made.family == family
    reader = CheckpointReader(made.checkpoint)
    assert reader.problems() == []
    assert {reader.stored(name).dtype for name in reader.names} == {torch.bfloat16}, "as small as the folder"
    assert {reader.full(name).dtype for name in reader.names} == {torch.float32}
    tokens_BS, logits_BPV = reader.probe()
    model, _ = load_model(made.checkpoint)
    whole = model_logits(model, tokens_BS[:, : logits_BPV.shape[1]], 521)
    assert (whole - logits_BPV).abs().max() <= 1e-5, "layer by layer as all at once"
    export = export_checkpoint(tmp_path / "made" / "checkpoints", tmp_path / "back", "bfloat16")
    assert export.family == family
    assert all(report.max_difference <= 1e-5 for report in export.certificate.comparisons.values())
    there, back = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    assert set(there) == set(back)
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], there[name]) for name in there)
    run = run_config_from_dict(yaml.safe_load(made.config.read_text()))
    assert run.model == reader.run.model
    assert run.checkpoint.directory == str(tmp_path / "made" / "checkpoints")


@in_own_process
def test_new_tokens_pickles_and_what_goes_wrong(tmp_path):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.import_hf import import_checkpoint

    write_hf_model(tmp_path / "hf", "gpt2", torch.float32)
    tensors = tensors_in(tmp_path / "hf")
    for path in [*(tmp_path / "hf").glob("*.safetensors"), tmp_path / "hf" / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(
        tensors | {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"].double()},
        tmp_path / "hf" / "pytorch_model.bin",
    )
    with pytest.raises(ConversionError, match="pickle files"):
        import_checkpoint(tmp_path / "hf", tmp_path / "made")
    made = import_checkpoint(tmp_path / "hf", tmp_path / "made", vocab_size=530, allow_pickle=True)
    assert made.notes == ["9 new tokens (model.vocab_size=530, 521 there) start at the mean of the others"]
    assert torch.equal(CheckpointReader(made.checkpoint).stored("final_norm.bias"), tensors["transformer.ln_f.bias"])
    rows = CheckpointReader(made.checkpoint).full("embedding.word_embeddings.weight")
    assert torch.equal(rows[:521], tensors["transformer.wte.weight"])
    assert (rows[521:] - rows[:521].mean(0)).abs().max() < 1e-6
    with pytest.raises(ConversionError, match="made exists; give another folder"):
        import_checkpoint(tmp_path / "hf", tmp_path / "made", allow_pickle=True)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    tensors["transformer.h.1.ln_1.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"layers.1.input_layernorm.weight has values that are not finite"):
        import_checkpoint(tmp_path / "hf", tmp_path / "other")
    with pytest.raises(ConversionError, match=r"config.json/made cannot be written \(.*make room, or give another"):
        import_checkpoint(tmp_path / "hf", tmp_path / "hf" / "config.json" / "made")
    with pytest.raises(DataError, match=r"tokenizer absent\.model does not exist"):
        import_checkpoint(tmp_path / "hf", tmp_path / "other", tokenizer="absent.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "made"]
