"""Folders read tensor by tensor, part by part; what is wrong with one is told in one error that names it."""

import json
import pickle
import random
import struct

import pytest
import torch
from convert_reference import MODELS, model_of, random_weights
from safetensors.torch import load_file, save_file

from megagpt.convert.family import TokenIds
from megagpt.convert.hf_weights import HfWeights
from megagpt.convert.safetensors_read import SafetensorsFile
from megagpt.convert.tables import family_for
from megagpt.convert.writer import write_hf_folder
from megagpt.errors import ConversionError
from megagpt.model.partition import partition_of
from megagpt.plan.hf_config import read_hf_model
from megagpt.pretrained import PretrainedWeights

TOKENS = TokenIds(1, 2, 3)


@pytest.fixture
def exported(tmp_path):
    """Write a model by name; gives the folder and its canonical weights."""

    def make(name, **options):
        model = model_of(name)
        weights = random_weights(model)
        write_hf_folder(tmp_path / name, model, weights.__getitem__, weights, None, **options)
        return tmp_path / name, weights

    return make


@pytest.mark.parametrize("name", MODELS)
def test_config_and_weights_come_back(name, exported):
    folder, weights = exported(name, max_shard_bytes=20_000)
    model, found = model_of(name), HfWeights(folder)
    assert found.family.name == read_hf_model(folder)[0] == MODELS[name][0]
    for key, value in model:
        other = getattr(found.model, key)
        if key == "moe_layer_freq":
            assert [model.has_experts(i) for i in range(2)] == [found.model.has_experts(i) for i in range(2)]
        elif key == "query_pre_attn_scalar":
            assert (value or model.kv_channels) == (other or found.model.kv_channels)
        elif key == "rotary_base_local" and model.sliding_window is None:
            pass
        elif key == "sliding_window" and MODELS[name][0] == "gemma2" and value is None:
            assert all(found.model.window_of_layer(i) is None for i in range(2))
        elif key == "ffn_hidden_size" and all(model.has_experts(i) for i in range(2)):
            pass  # no layer has one
        elif key == "add_qkv_bias" and model.add_bias_linear:
            pass  # implied
        else:
            assert other == value, key
    assert set(found.names) == set(weights)
    for canonical, tensor in weights.items():
        assert torch.equal(found.read(canonical), tensor), canonical


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama-gqa-tied", 4), ("llama-mqa-wide-heads", 2), ("gpt2-untied-gelu", 4), ("gpt_neox", 2), ("mixtral", 4)],
)
def test_shards_are_those_of_the_whole_tensor(name, size, exported):
    folder, weights = exported(name)
    model = model_of(name)
    pretrained, padded = PretrainedWeights(HfWeights(folder), model), 264
    for canonical, tensor in weights.items():
        for rank in range(size):
            expected = partition_of(canonical, model.is_gated).shard(tensor, rank, size, padded)
            assert torch.equal(pretrained.shard(canonical, rank, size, padded), expected), (canonical, rank)


def test_a_rank_reads_no_more_than_its_part(exported, monkeypatch):
    folder, weights = exported("llama")
    read = []
    original = SafetensorsFile._read_into
    monkeypatch.setattr(
        SafetensorsFile, "_read_into", lambda self, t, *where: read.append(t.nbytes) or original(self, t, *where)
    )
    pretrained = PretrainedWeights(HfWeights(folder), model_of("llama"))
    total = sum(pretrained.shard(name, 1, 4, 260).nbytes for name in weights)
    assert sum(read) <= total < sum(tensor.nbytes for tensor in weights.values()) / 3


def test_new_tokens_start_at_the_mean_and_surplus_ones_are_left_out(exported):
    folder, weights = exported("llama")
    larger = PretrainedWeights(HfWeights(folder), model_of("llama").model_copy(update={"vocab_size": 300}))
    name = "head.weight"
    grown = larger.full(name)
    assert torch.equal(grown[:257], weights[name])
    assert (grown[257:] - weights[name].mean(0)).abs().max() < 1e-6
    assert len(grown) == 300
    last = larger.shard(name, 3, 4, 320)  # rows 240 to 319: known, new and padding
    assert torch.equal(last[:17], weights[name][240:])
    assert torch.equal(last[17:60], grown[257:])
    assert not last[60:].any()
    assert larger.notes == ["43 new tokens (model.vocab_size=300, 257 there) start at the mean of the others"]
    smaller = PretrainedWeights(HfWeights(folder), model_of("llama").model_copy(update={"vocab_size": 250}))
    assert torch.equal(smaller.full(name), weights[name][:250])
    assert smaller.notes == ["the last 7 of 257 tokens are left out (model.vocab_size=250)"]


def test_missing_unknown_and_misshapen_tensors_are_one_error(exported):
    folder, _ = exported("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.7.extra.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(100, 24)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        HfWeights(folder)
    for part in (
        "lacks model.norm.weight",
        "has model.layers.7.extra.weight, which a llama model of its config.json has not",
        "lm_head.weight has shape [100, 24] where config.json says [257, 24]",
    ):
        assert part in str(caught.value)


def test_files_of_earlier_versions(exported):
    """Masks, frequencies, a tied head stored twice, names of the model without its head."""
    folder, weights = exported("gpt2-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    found = HfWeights(folder)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa-tied"])
def test_a_head_that_is_said_to_be_tied_and_is_not_is_refused(name, exported):
    folder, weights = exported(name)
    tensors = load_file(folder / "model.safetensors")
    head = weights["embedding.word_embeddings.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    HfWeights(folder)
    head[-1, -1] += 1
    for other in (head, head[:-1].contiguous()):
        save_file(tensors | {"lm_head.weight": other}, folder / "model.safetensors")
        with pytest.raises(ConversionError, match=r"tie_word_embeddings=true, but lm_head.weight is not the embedding"):
            HfWeights(folder)


def test_pickled_weights_only_when_asked_for(exported):
    folder, weights = exported("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"its weights are pickle files \(pytorch_model.bin\).*--allow-pickle"):
        HfWeights(folder)
    torch.save({"state": {}, "param_groups": [1e-3]}, folder / "optimizer.pt")  # as the Trainer leaves it beside them
    found = HfWeights(folder, allow_pickle=True)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in weights.items())


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def test_code_in_pickles_is_never_run(exported, tmp_path, monkeypatch):
    folder, _ = exported("llama")
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    for write in (lambda file: torch.save({"a": Evil()}, file), lambda file: pickle.dump({"a": Evil()}, file)):
        with (folder / "pytorch_model.bin").open("wb") as file:
            write(file)
        with pytest.raises(ConversionError, match="does not hold plain tensors, or is damaged"):
            HfWeights(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_an_index_that_does_not_fit_its_files(exported):
    folder, _ = exported("llama", max_shard_bytes=20_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, words in (
        ({"model.norm.weight": "../elsewhere.safetensors"}, "lies outside the folder"),
        ({"model.norm.weight": "model-00001-of-00002.safetensors"}, "cannot be read|are not in the files"),
        ({"model.more.weight": sorted(index["weight_map"].values())[0]}, "model.more.weight are not in the files"),
    ):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | change}))
        with pytest.raises(ConversionError, match=words):
            HfWeights(folder)
    path.write_text("[]")
    with pytest.raises(ConversionError, match="is not an index of weights"):
        HfWeights(folder)


def test_quantised_weights_and_biases_without_a_place_are_refused(exported):
    folder, _ = exported("llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(24, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"norm.weight is stored as I8; only F32, BF16, F16"):
        HfWeights(folder)
    model = model_of("qwen2-gqa")
    weights = random_weights(model)
    folder = folder.parent / "biased"
    family = family_for(model, own_tokenizer=True)  # a Llama whose output projection must have a bias
    tensors = {name: family.to_hf(name, weights.__getitem__, model) for name in family.hf_names(model)}
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1.0
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.hf_config(model, TOKENS)))
    with pytest.raises(ConversionError, match=r"layers.1.self_attn.o_proj.bias is not zero"):
        HfWeights(folder)


def test_hostile_headers_give_errors_and_never_other_bytes(tmp_path):
    """Every change of a header is refused or leaves each tensor as it was."""
    path, chooser = tmp_path / "x.safetensors", random.Random(3)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}
    save_file(tensors, path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    for _ in range(200):
        changed = bytearray(whole)
        for _ in range(chooser.randint(1, 3)):
            changed[chooser.randrange(8 + length)] = chooser.randrange(256)
        path.write_bytes(changed[: len(changed) - chooser.choice((0, 0, 1, 7))])
        try:
            file = SafetensorsFile(path)
            for name, tensor in tensors.items():
                if name in file.tensors and file.shape(name) == tensor.shape and file.dtype(name) == tensor.dtype:
                    assert torch.equal(file.read(name), tensor)
        except ConversionError as error:
            refused += str(path) in str(error)
    assert refused > 150
