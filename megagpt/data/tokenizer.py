"""Sentencepiece tokenizers: loading, encoding and training.

Text is not normalised, so that decoding gives back what was encoded, with one exception that lies in sentencepiece
itself: it writes a space as U+2581, so a literal U+2581 comes back as a space.
"""

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from megagpt.data.files import write_whole
from megagpt.errors import DataError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_BYTE_PIECES = 256
# The 256 bytes, <unk>, <s>, </s> and at least one learned piece.
SMALLEST_VOCABULARY = _BYTE_PIECES + 4


class Tokenizer:
    """A sentencepiece model. Ids run from 0 to vocab_size - 1.

    Attributes:
        path: the .model file.
        sha256: hash of that file; a dataset's manifest carries it.
        vocab_size: number of tokens.
        eod_id: end-of-document token (sentencepiece's `</s>`).
        bos_id, pad_id: begin-of-sequence and padding tokens; None where the model has none.
    """

    def __init__(self, path: Path, model: bytes):
        """Use `Tokenizer.load`."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{path} is not a sentencepiece model; train one with tools/train_tokenizer.py") from None
        if processor.get_piece_size() == 0:
            raise DataError(f"{path} is a sentencepiece model without tokens; train one with tools/train_tokenizer.py")
        if processor.eos_id() < 0:
            raise DataError(
                f"{path} has no end-of-sequence token (</s>), which ends documents; train it with eos_id >= 0"
            )
        self._processor = processor
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = processor.get_piece_size()
        self.eod_id: int = processor.eos_id()
        self.bos_id: int | None = _present(processor.bos_id())
        self.pad_id: int | None = _present(processor.pad_id())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a .model file.

        Raises:
            DataError: the file is missing, unreadable or not a sentencepiece model.
        """
        path = Path(path)
        try:
            model = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"tokenizer {path} does not exist; train one with tools/train_tokenizer.py") from None
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error.strerror}); give a sentencepiece .model"
            ) from None
        return cls(path, model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end tokens; special tokens spelt out in the text stay plain text.

        Raises:
            DataError: the text has lone surrogates, which no UTF-8 file can hold.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in order, in this thread.

        Raises:
            DataError: a text has lone surrogates, which no UTF-8 file can hold.
        """
        try:
            return self._processor.encode(texts, out_type=int, num_threads=1)
        except (RuntimeError, TypeError, UnicodeError):
            for text in texts:
                if (fault := encoding_fault(text)) is not None:
                    raise DataError(f"text {text[:40]!r} cannot be encoded: {fault}") from None
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a list of ids; control tokens give no text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token {token} is outside tokenizer {self.path} (0 to {self.vocab_size - 1})")
        return self._processor.decode(ids)


def _present(token: int) -> int | None:
    return token if token >= 0 else None


def encoding_fault(text: str) -> str | None:
    """Why a text has no UTF-8 form, or None if it has one (JSON escapes can spell halves of surrogate pairs)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}"
    return None


def train_sentencepiece(
    texts: Iterable[str],
    prefix: str | Path,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    max_documents: int = 0,
    character_coverage: float = 0.9995,
    seed: int = 0,
    verbose: bool = False,
) -> Tokenizer:
    """Train a tokenizer and write it to `prefix`.model. The same texts and arguments give the same file.

    Characters outside the coverage are spelt as UTF-8 bytes, so no text is lost.

    Args:
        texts: documents; empty ones do not count.
        prefix: path of the file without .model.
        vocab_size: number of tokens, exactly.
        model_type: byte-pair merges or a unigram language model.
        max_documents: train on this many documents drawn by `seed`; 0 takes all (they are held in memory).
        character_coverage: share of the text's characters that get tokens of their own.
        seed: draws the documents.
        verbose: let sentencepiece print its log.

    Raises:
        DataError: no text, too little text for the vocabulary, or the file cannot be written.
    """
    path = Path(f"{prefix}.model")
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size={vocab_size} is too small: bytes and special tokens take {SMALLEST_VOCABULARY - 1};"
            f" use {SMALLEST_VOCABULARY} or more"
        )
    model = io.BytesIO()
    counted = _CountedTexts(_draw(texts, max_documents, seed) if max_documents else texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=character_coverage,
            # Text must survive encoding and decoding: no Unicode normalisation, no added or removed spaces.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            # Whole documents are passed as sentences; the default drops those above 4192 bytes.
            max_sentence_length=1 << 30,
            # The result of more threads depends on their number.
            num_threads=1,
            minloglevel=0 if verbose else 2,
        )
    except RuntimeError as error:
        raise DataError(_training_fault(str(error), vocab_size, counted)) from None
    write_whole(path, model.getvalue())
    return Tokenizer.load(path)


def _draw(texts: Iterable[str], num_documents: int, seed: int) -> list[str]:
    """A uniform sample of the documents that are not empty (J. Vitter, "Random Sampling with a Reservoir", 1985)."""
    # Only random() is promised to give the same numbers in every version of Python.
    uniform = random.Random(seed).random
    drawn: list[str] = []
    for seen, text in enumerate(filter(None, texts)):
        if seen < num_documents:
            drawn.append(text)
        elif (slot := int(uniform() * (seen + 1))) < num_documents:
            drawn[slot] = text
    return drawn


class _CountedTexts:
    """Passes texts on and counts them, for the error message."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.documents = 0
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if text:
                self.documents += 1
                self.characters += len(text)
                yield text


def _training_fault(message: str, vocab_size: int, counted: _CountedTexts) -> str:
    if counted.documents == 0:
        return "there is no text to train a tokenizer on; give JSONL files with documents that are not empty"
    corpus = f"{counted.documents} documents with {counted.characters} characters"
    if found := re.search(r"too high.*<= (\d+)", message):
        return f"vocab_size={vocab_size} is too large for {corpus}; use {found[1]} or less, or give more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of {corpus};"
            f" use more than {found[1]} or a lower character coverage"
        )
    return f"sentencepiece cannot train vocab_size={vocab_size} on {corpus}: {message.strip()}; give more text"
