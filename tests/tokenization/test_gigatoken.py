"""The fast library is used only where it agrees with the reference, and is watched while it is used."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError
from megagpt.tokenization import gigatoken_codec
from megagpt.tokenization.gigatoken_codec import fast_codec
from megagpt.tokenization.tokenizer import Tokenizer

END = "<|endoftext|>"
TEXTS = [f"The quick brown fox number {i}'s jumps over\n\n    the lazy dog, {i * 7} times. Ünïcödé" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, "<a>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "split_special_tokens": True}))
    return Tokenizer.load(folder)


def test_the_same_ids(tokenizer):
    codec, reason = fast_codec(tokenizer, TEXTS[:50])
    assert codec is not None, reason
    # Where a special token is spelt out, the reference decides (here: plain text).
    texts = [*TEXTS, "", " ", f"a {END} b", "<a>", "<", "漢字 🙂\r\n\t"]
    assert codec.encode_batch(texts, 1) == tokenizer.codec.encode_batch(texts, 1)
    assert codec.decode(codec.encode_batch(["fox"], 1)[0]) == "fox"


def test_a_cache_that_has_grown_is_dropped(tokenizer, monkeypatch):
    codec, _ = fast_codec(tokenizer, [])
    renewed = []
    original = type(codec)._renew
    monkeypatch.setattr(type(codec), "_renew", lambda self: (renewed.append(1), original(self)))
    monkeypatch.setattr(gigatoken_codec, "_FEWEST_BYTES_BETWEEN_RENEWALS", 100)
    codec._limit = 0
    codec.encode_batch(TEXTS[:5], 1)
    assert renewed == []
    assert codec.encode_batch(TEXTS[:5], 1) == tokenizer.codec.encode_batch(TEXTS[:5], 1)
    assert renewed == [1]


def test_disagreement_is_found_by_the_probe_and_later(tokenizer, monkeypatch):
    monkeypatch.setattr(gigatoken_codec, "_CHECK_EVERY", 10)
    codec, _ = fast_codec(tokenizer, [])
    encode = codec._encode
    codec._encode = lambda text: encode(text + "x")
    codec.encode_batch(TEXTS[:9], 1)
    with pytest.raises(DataError, match=r"gigatoken gives other tokens .* start again with --backend reference"):
        codec.encode_batch(TEXTS[:9], 1)
    monkeypatch.setattr(gigatoken_codec.GigatokenCodec, "_renew", lambda self: None)
    monkeypatch.setattr(gigatoken_codec.GigatokenCodec, "_encode", lambda self, text: encode("other"), raising=False)
    monkeypatch.setattr(gigatoken_codec.GigatokenCodec, "_seen", 0, raising=False)
    codec, reason = fast_codec(tokenizer, TEXTS[:2])
    assert codec is None
    assert reason.startswith('gigatoken gives other tokens for the text "The quick')


def test_other_kinds_have_none(tmp_path):
    model = train_sentencepiece(TEXTS, tmp_path / "t", 400)
    assert fast_codec(model, []) == (None, "there is no faster library for sentencepiece files")
