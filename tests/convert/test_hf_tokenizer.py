"""The exported tokenizer against sentencepiece: the same ids and the same text for anything."""

import io
import itertools
import json
import random

import pytest
import sentencepiece
from convert_reference import MODELS, model_of, random_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megagpt.convert.family import TokenIds
from megagpt.convert.sentencepiece_to_hf import (
    SPACE_MARK,
    build_tokenizer,
    merges_of,
    read_pieces,
    words_are_separable,
)
from megagpt.convert.tables import LLAMA, QWEN2
from megagpt.convert.tokenizer import export_tokenizer
from megagpt.convert.verify import require_same_tokens
from megagpt.convert.writer import write_hf_folder
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import ConversionError, DataError
from megagpt.plan.config import ModelConfig

SENTENCE = (
    "the quick brown fox jumps over a lazy dog naïve façade Straße привет мир как дела こんにちは世界 你好 世界 "
    "مرحبا بالعالم שלום 안녕하세요 नमस्ते 12345 3.14 def return import self print for x in range(10): 😀 🎉 👩‍💻"
)
WORDS = SENTENCE.split()
# Pieces of text that could betray a difference: spaces, special tokens spelt out, bytes, controls, rare characters.
SNIPPETS = [
    *WORDS,
    *" \n\t\r",
    "  ",
    "    ",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "<pad>",
    SPACE_MARK,
    "\u00a0",
    "\0",
    "é",
    "𒀀",
    "1" * 9,
]


def corpus() -> list[str]:
    rng = random.Random(7)
    text = [" ".join(rng.choices(WORDS, k=14)) for _ in range(600)]
    code = [" " * rng.choice([0, 4, 8]) + " ".join(rng.choices(WORDS, k=3)) + "\n\n    x = 1\n" for _ in range(200)]
    return text + code


def train(path, **options) -> str:
    """Train with the settings of tools/train_tokenizer.py, changed by `options`."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 620,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **(defaults | options)
    )
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The sentencepiece processor of our own training and the tokenizer that AutoTokenizer loads from its export."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = train_sentencepiece(corpus(), folder / "ours", 620, character_coverage=0.999).path
    export_tokenizer(path, folder, 620, 64)
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), AutoTokenizer.from_pretrained(folder)


def assert_same(pair, text: str) -> None:
    processor, tokenizer = pair
    ids = processor.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == processor.decode(ids) == text.replace(SPACE_MARK, " ")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.lists(st.sampled_from(SNIPPETS)).map("".join), st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_gives_the_ids_of_sentencepiece(pair, text):
    assert_same(pair, text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "   ", "\n", "\n\n  \n", " leading", "trailing ", "a  b   c", "1234567890", "</s>", "a</s>b", "<s><unk>"],
)
def test_edge_cases(pair, text):
    assert_same(pair, text)


def test_whole_documents(pair):
    for document in corpus():
        assert_same(pair, document)


@pytest.mark.parametrize(
    "options",
    [
        {"pad_id": 3},
        {"allow_whitespace_only_pieces": True, "split_by_whitespace": False, "max_sentencepiece_length": 12},
        {"user_defined_symbols": ["<|im|>", "▁▁", "fo"]},
        {"split_digits": False, "split_by_unicode_script": False, "split_by_number": False},
        {"bos_id": -1, "eos_id": 0, "unk_id": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_of_the_trainer(options, tmp_path):
    path = train(tmp_path / "t.model", **options)
    ids = export_tokenizer(path, tmp_path, 620, 64).ids
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert ids == TokenIds(processor.eos_id(), processor.eos_id(), 3 if "pad_id" in options else None)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (ids.bos, ids.eos, ids.pad)
    assert tokenizer.unk_token_id == processor.unk_id()
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices([*SNIPPETS, "<|im|>", "fox", "   "], k=12))
        assert_same((processor, tokenizer), text)


@pytest.fixture(scope="module")
def unigram_pair(tmp_path_factory):
    """The same as `pair` for a unigram model with chat and padding tokens."""
    folder = tmp_path_factory.mktemp("unigram")
    special = ["<|im_start|>", "<|im_end|>"]
    model = train_sentencepiece(corpus(), folder / "t", 420, model_type="unigram", special_tokens=special, pad=True)
    assert export_tokenizer(model.path, folder, 620, 64).ids == TokenIds(2, 2, 5)
    return sentencepiece.SentencePieceProcessor(model_file=str(model.path)), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.lists(st.sampled_from([*SNIPPETS, "<|im_end|>"]), max_size=12).map("".join),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    )
)
def test_unigram_models_give_the_ids_of_sentencepiece(unigram_pair, text):
    """The very ids, unless two segmentations are equally good (8 spaces as 3 + 5 or 5 + 3): rounding decides there."""
    processor, tokenizer = unigram_pair
    expected, found = processor.encode(text), tokenizer(text)["input_ids"]
    if found != expected:
        assert sum(map(processor.get_score, found)) == pytest.approx(sum(map(processor.get_score, expected)), abs=1e-3)
        assert not {0, 1, 2, 3, 4, 5} & set(found)
    assert tokenizer.decode(found) == processor.decode(expected) == text.replace(SPACE_MARK, " ")


def test_unigram_documents_and_special_tokens(unigram_pair):
    for document in corpus():
        assert_same(unigram_pair, document)
    processor, tokenizer = unigram_pair
    assert tokenizer("<|im_end|>", split_special_tokens=False)["input_ids"] == [4]
    assert (tokenizer.pad_token, tokenizer.pad_token_id, processor.pad_id()) == ("<pad>", 5, 5)


def test_words_are_cut_only_if_no_piece_spans_them(tmp_path):
    assert words_are_separable(read_pieces(train(tmp_path / "a.model", allow_whitespace_only_pieces=True)))
    spanning = read_pieces(train(tmp_path / "b.model", split_by_whitespace=False))
    assert any(SPACE_MARK in piece[1:].lstrip(SPACE_MARK) for piece in spanning.texts)
    assert not words_are_separable(spanning)


def test_overlapping_merges_of_one_piece_go_from_left_to_right(tmp_path):
    """All strings over two letters: repetitions make pairs of the same piece overlap."""
    model = io.BytesIO()
    rng = random.Random(1)
    texts = ["".join(rng.choices("ab", weights=[3, 2], k=30)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    tokenizer = build_tokenizer(read_pieces(tmp_path / "t.model"))
    texts = ["".join(letters) for length in range(1, 12) for letters in itertools.product("ab", repeat=length)]
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == processor.encode(texts)


def test_merges_are_ordered_by_score(tmp_path):
    pieces = read_pieces(train(tmp_path / "t.model"))
    scores = dict(zip(pieces.texts, pieces.scores, strict=True))
    merged = [scores[left + right] for left, right in merges_of(pieces)]
    assert len(merged) > 200
    assert merged == sorted(merged, reverse=True)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "tied" in name or name in ("llama", "qwen2-gqa", "mistral")]
)
def test_exports_of_every_family_load_our_tokenizer(name, tmp_path):
    """AutoTokenizer chooses by the family: none may replace our tokenizer by its own."""
    model = ModelConfig(**model_of(name).model_dump() | {"vocab_size": 640})
    weights = random_weights(model)
    path = train(tmp_path / "t.model")
    made = write_hf_folder(tmp_path / "out", model, weights.__getitem__, weights, path)
    assert made.family != "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    for text in ("".join(SNIPPETS), " the  quick\n\nfox </s>世界😀"):
        assert_same((processor, tokenizer), text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 2, None)
    assert generation == {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2}
    assert tokenizer.model_max_length == 32


def test_a_family_with_a_tokenizer_of_its_own_takes_no_other(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    model = ModelConfig(**model_of("qwen2-gqa").model_dump() | {"vocab_size": 640})
    with pytest.raises(ConversionError, match=r"family qwen2: .* which gives other tokens than .*t\.model; leave"):
        require_same_tokens(QWEN2, model, train(tmp_path / "t.model"))
    require_same_tokens(LLAMA, model, str(tmp_path / "t.model"))
    own = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    own.save_pretrained(tmp_path / "own")
    require_same_tokens(QWEN2, model, str(tmp_path / "own"))


def test_special_tokens_are_skipped_and_found_on_request(pair):
    processor, tokenizer = pair
    ids = processor.encode("fox")
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "fox"
    assert tokenizer("fox</s>", split_special_tokens=False)["input_ids"] == [*ids, 2]
    assert tokenizer("fox</s>")["input_ids"] == processor.encode("fox</s>") != [*ids, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char", "vocab_size": 380}, "model_type is neither bpe nor unigram"),
        ({"model_type": "unigram", "vocab_size": 380, "user_defined_symbols": ["<|x|>"]}, "user-defined pieces"),
        ({"model_type": "unigram", "vocab_size": 380}, "characters '.*' of control and byte pieces are no pieces"),
        ({"byte_fallback": False, "vocab_size": 300}, "byte_fallback is false"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix is true"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name is nmt_nfkc, not identity"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_reproduced_are_refused(options, message, tmp_path):
    path = train(tmp_path / "t.model", **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=message):
        export_tokenizer(path, tmp_path / "out", 620, 64)
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.model: no such tokenizer file"):
        read_pieces(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model at all, just words")
    with pytest.raises(DataError, match=r"text.model: not a sentencepiece"):
        read_pieces(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.model: not a sentencepiece"):
        read_pieces(tmp_path / "empty.model")
    with pytest.raises(DataError, match=r"has no end-of-sequence token"):
        export_tokenizer(train(tmp_path / "t.model", eos_id=-1), tmp_path, 620, 64)
    with pytest.raises(ConversionError, match=r"has 620 tokens but model.vocab_size=600"):
        export_tokenizer(train(tmp_path / "t.model"), tmp_path, 600, 64)
