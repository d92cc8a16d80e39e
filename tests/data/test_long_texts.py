"""Long lines and texts in fragments and pieces: the same texts, tokens and faults as whole ones."""

import io
import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megagpt.data import long_lines
from megagpt.data.jsonl import BadLineError, parse_texts
from megagpt.data.long_lines import LongLine
from megagpt.data.long_texts import cut_into_pieces
from megagpt.data.tokenizer import train_sentencepiece

TEXTS = [
    f"The quick brown fox number {i}'s jumps over\n\n    the lazy dog, {i * 7} times.  Ünïcödé" for i in range(200)
]
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    monkeypatch.setattr(long_lines, "_CHUNK_BYTES", 7)
    monkeypatch.setattr(long_lines, "LONG_STRING_BYTES", 12)


def texts_of_long_line(line: bytes, keys):
    rest = io.BytesIO(line.removesuffix(b"\n") + b"\nthe next line")
    long_line = LongLine(rest.readline(5), rest)
    assert rest.read() == b"the next line"
    found = []
    for text in parse_texts(long_line.reduce(), keys):
        fragments = long_line.fragments(text)
        found.append(text if fragments is None else "".join(fragments))
    long_line.check()
    return found


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=15), values, max_size=3),
    max_leaves=5,
)
NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@FEW
@given(NO_SURROGATES, st.dictionaries(st.text(max_size=20), JSON_VALUES, max_size=3), st.booleans())
def test_fragments_make_the_text(text, others, escaped):
    line = json.dumps({**others, "text": text, "more": [text, "\\"]}, ensure_ascii=escaped)
    line = line.encode("utf-8", "replace") + b"\n"
    assert texts_of_long_line(line, ["text"]) == parse_texts(line, ["text"])


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b"x" * 100,
        b'{"text": "' + b"x" * 40 + b"\xff" + b'"}',
        b'{"text": "' + b"x" * 40 + b"\\q" + b'"}',
        b'{"text": "' + b"x" * 40 + b"\t" + b'"}',
        b'{"text": "' + b"x" * 40 + b'\\ud800"}',
        b'{"text": "' + b"x" * 40 + b'\\ud800 and more of it to follow"}',
        b'{"text": "' + b"x" * 40 + b'\\udc00\\ud800"}',
        b'{"other": "' + b"x" * 40 + b'\\q", "text": "good"}',
        b'{"text": "' + b"x" * 40 + b'"} trailing',
        b'{"text": ["' + b"x" * 40 + b'"]}',
        b'["' + b"x" * 40 + b'"]',
    ],
)
def test_faults_of_long_lines(line):
    with pytest.raises(BadLineError):
        texts_of_long_line(line, ["text"])
    with pytest.raises(BadLineError):
        parse_texts(line, ["text"])


def test_several_long_values(monkeypatch):
    record = {"a": "é" * 50, "b": "b😀\\" * 50, "c": "short"}
    line = json.dumps(record).encode()
    assert texts_of_long_line(line, ["c", "b", "a"]) == ["short", record["b"], record["a"]]


def sentencepiece_codec(folder, vocab_size=400, **options):
    model = train_sentencepiece(TEXTS, folder / "t", vocab_size, **options)
    return lambda texts: model.codec.encode_batch(texts, 1)


def dummy_prefix_codec(folder):
    """As Llama 2's: a mark for a space goes before each text."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "d"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "d.model"))
    return lambda texts: processor.encode(texts)


def byte_level_codec(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


CODECS = {
    "bpe": sentencepiece_codec,
    "unigram": lambda folder: sentencepiece_codec(folder, 317, model_type="unigram"),
    "dummy prefix": dummy_prefix_codec,
    "byte level": byte_level_codec,
}


@pytest.fixture(scope="module", params=CODECS)
def encode(request, tmp_path_factory):
    return CODECS[request.param](tmp_path_factory.mktemp("codec"))


WORDS = st.sampled_from([*TEXTS[:3], "fox", " ", "  ", "\n", "\n\n", "漢字", "jumps", ", ", "e\u0301", "12345", "</s>"])


@FEW
@given(st.lists(WORDS, min_size=20, max_size=150), st.integers(1, 50))
def test_pieces_have_the_tokens_of_the_whole(encode, words, fragment):
    text = " ".join(words) + "".join(words)
    fragments = [text[at : at + fragment] for at in range(0, len(text), fragment)]
    pieces = list(cut_into_pieces(fragments, encode, 300))
    assert len(pieces) > 1 or len(text) < 1400
    tokens = [token for ids in encode(pieces) for token in ids]
    assert tokens == encode([text])[0]


def test_a_text_without_a_place_to_cut_is_refused():
    bytewise = lambda texts: [list(text.encode()) for text in texts]  # noqa: E731
    with pytest.raises(BadLineError, match=r"characters of a long text without a place to cut"):
        list(cut_into_pieces(["a" * 20000], bytewise, 300))
    assert len(list(cut_into_pieces(["a" * 1300], bytewise, 300))) == 1
