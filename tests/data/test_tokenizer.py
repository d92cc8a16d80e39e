"""Training, loading and exact round trips."""

import hashlib

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.tokenizer import CHAT_TOKENS, Tokenizer, train_sentencepiece
from megagpt.errors import DataError

VOCABULARY = 360
TEXTS = [f"The quick brown fox number {i} jumps over\n\n    the lazy dog, {i * 7} times." for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "small", VOCABULARY)


def test_attributes(tokenizer):
    assert tokenizer.vocab_size == VOCABULARY
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


# U+2581 is how sentencepiece writes a space; surrogates have no UTF-8 form.
ENCODABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(ENCODABLE)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < token < VOCABULARY for token in ids)


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces ", "\n\n\t x\r\n", "a\x00b", "漢字 🙂", "</s><s><unk>", "2024"]
)
def test_awkward_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:5]) == [tokenizer.encode(text) for text in TEXTS[:5]]
    assert tokenizer.encode_batch([]) == []


def test_arrays_hold_the_same_ids(tokenizer, monkeypatch):
    texts = [*TEXTS[:5], "", "</s>"]
    for is_new_library in (True, False):
        monkeypatch.setattr(tokenizer.codec, "_gives_arrays", tokenizer.codec._gives_arrays and is_new_library)
        found = tokenizer.codec.encode_arrays(texts, 1)
        assert [ids.tolist() for ids in found] == tokenizer.encode_batch(texts)


def test_common_words_are_short(tokenizer):
    assert len(tokenizer.encode("The quick brown fox")) < 10


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("123456")) == 6


def test_training_is_deterministic(tokenizer, tmp_path):
    again = train_sentencepiece(TEXTS, tmp_path / "again", VOCABULARY)
    assert again.sha256 == tokenizer.sha256


def test_drawn_documents_follow_the_seed(tmp_path):
    def draw(name, seed):
        return train_sentencepiece(VARIED, tmp_path / name, 300, max_documents=40, seed=seed).sha256

    assert draw("a", 1) == draw("b", 1)
    assert draw("a", 1) != draw("c", 2)


VARIED = [f"{chr(97 + i % 26) * 5} {chr(97 + i * 7 % 26)}{chr(97 + i * 3 % 26)} word{i}" for i in range(400)]


def test_special_and_chat_tokens(tmp_path):
    tokenizer = train_sentencepiece(TEXTS, tmp_path / "t", 340, special_tokens=["<|tool|>", *CHAT_TOKENS], pad=True)
    assert tokenizer.special_tokens == {
        "<s>": 1,
        "</s>": 2,
        "<|tool|>": 3,
        "<|im_start|>": 4,
        "<|im_end|>": 5,
        "<pad>": 6,
    }
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (340, 6)
    spelt = "<|im_start|>user <pad></s>"
    assert tokenizer.decode(tokenizer.encode(spelt)) == spelt
    assert min(tokenizer.encode(spelt)) > 6


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["<s>"], "'<s>' is empty, occurs twice or has a fixed meaning"),
        (["<a>", "<a>"], "'<a>' is empty, occurs twice"),
        ([""], "'' is empty"),
        (["<0x0A>"], "'<0x0A>' .* fixed meaning"),
        (["a,b"], "'a,b' has a comma"),
    ],
)
def test_unusable_special_tokens(tmp_path, special, message):
    with pytest.raises(DataError, match=message):
        train_sentencepiece(TEXTS, tmp_path / "t", 340, special_tokens=special)


def test_unigram_and_bytes_and_digits_by_choice(tmp_path):
    texts = [text + " 2024 2024" for text in TEXTS]
    unigram = train_sentencepiece(texts, tmp_path / "u", 400, model_type="unigram", split_digits=False)
    assert unigram.decode(unigram.encode("The fox 漢 2024")) == "The fox 漢 2024"
    assert len(unigram.encode("2024")) < 4
    plain = train_sentencepiece(texts, tmp_path / "p", 100, byte_fallback=False)
    assert plain.vocab_size == 100
    assert plain.encode("漢") == [0]


def test_training_is_quiet(tmp_path, capfd):
    train_sentencepiece(TEXTS, tmp_path / "t", 300)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"], 5000, r"vocab_size=5000 is too large for 1 documents with 11 characters; use \d+ or less"),
        ([], 300, "no text"),
        ([""], 300, "no text"),
        (TEXTS, 259, "vocab_size=259 is too small: .* use 260 or more"),
        (["".join(map(chr, range(0x4E00, 0x4F00)))], 300, r"too small for the characters .* use more than \d+"),
    ],
)
def test_training_faults(tmp_path, texts, vocab_size, message):
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, tmp_path / "t", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_named_in_the_error_works(tmp_path):
    with pytest.raises(DataError) as caught:
        train_sentencepiece(["hello world hello"], tmp_path / "t", 5000)
    largest = int(str(caught.value).split("use ")[1].split()[0])
    assert train_sentencepiece(["hello world hello"], tmp_path / "t", largest).vocab_size == largest


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.model does not exist; train one with"):
        Tokenizer.load(tmp_path / "nothing.model")
    with pytest.raises(DataError, match=r"is a folder without tokenizer\.json \(other tokenizer files: none\)"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_not_a_model(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model is "):
        Tokenizer.load(path)


def test_truncated_model(tokenizer, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(tokenizer.path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut\.model"):
        Tokenizer.load(path)


def test_model_without_eos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "t"), vocab_size=100, eos_id=-1, minloglevel=2
    )
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Tokenizer.load(tmp_path / "t.model")


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"character 1 is the lone surrogate U\+D800"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_decode_refuses_unknown_ids(tokenizer, token):
    with pytest.raises(DataError, match=f"token {token} is outside"):
        tokenizer.decode([5, token])
