"""Training of sentencepiece tokenizers."""

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from megagpt.data.files import write_whole
from megagpt.errors import DataError
from megagpt.tokenization.tokenizer import Tokenizer

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
PAD_TOKEN = "<pad>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What begins and ends a message in ChatML, the most common chat format."""
_BYTE_PIECES = 256
# <unk>, <s>, </s> and at least one learned piece.
_FEWEST_OTHERS = 4
SMALLEST_VOCABULARY = _BYTE_PIECES + _FEWEST_OTHERS
# All characters in which control and byte pieces are spelt: a unigram model that knows each of them has an exact
# Hugging Face counterpart (see megagpt.convert.tokenizer).
_PIECE_CHARACTERS = "<>/0123456789ABCDEFxsunk"


def train_sentencepiece(
    texts: Iterable[str],
    prefix: str | Path,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    split_digits: bool = True,
    special_tokens: Sequence[str] = (),
    pad: bool = False,
    max_documents: int = 0,
    character_coverage: float = 0.9995,
    seed: int = 0,
    verbose: bool = False,
) -> Tokenizer:
    """Train a tokenizer and write it to `prefix`.model. The same texts and arguments give the same file.

    Special tokens never come out of a text, even if it spells them; they are there for whoever builds prompts.

    Args:
        texts: documents; empty ones do not count.
        prefix: path of the file without .model.
        vocab_size: number of tokens, exactly.
        model_type: byte-pair merges or a unigram language model.
        byte_fallback: spell characters outside the coverage as UTF-8 bytes, so that no text is lost; without it they
            become `<unk>`.
        split_digits: one token for each digit.
        special_tokens: more special tokens beside `<unk>`, `<s>` and `</s>`, such as `CHAT_TOKENS`; ids from 3.
        pad: have a padding token `<pad>`, behind the special tokens.
        max_documents: train on this many documents drawn by `seed`; 0 takes all (they are held in memory).
        character_coverage: share of the text's characters that get tokens of their own.
        seed: draws the documents.
        verbose: let sentencepiece print its log.

    Raises:
        DataError: no text, too little text for the vocabulary, a special token twice or empty, or the file cannot be
            written.
    """
    path = Path(f"{prefix}.model")
    special = [*special_tokens, *([PAD_TOKEN] if pad else [])]
    _check_special(special)
    smallest = byte_fallback * _BYTE_PIECES + _FEWEST_OTHERS + len(special)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size={vocab_size} is too small: bytes and special tokens take {smallest - 1};"
            f" use {smallest} or more"
        )
    unigram = model_type == "unigram"
    model = io.BytesIO()
    counted = _CountedTexts(_draw(texts, max_documents, seed) if max_documents else texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            control_symbols=list(special_tokens),
            required_chars="".join(sorted({*_PIECE_CHARACTERS, *"".join(special)} - {" "})) if unigram else "",
            character_coverage=character_coverage,
            # Text must survive encoding and decoding: no Unicode normalisation, no added or removed spaces.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=split_digits,
            allow_whitespace_only_pieces=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=EOS_ID + 1 + len(special_tokens) if pad else -1,
            pad_piece=PAD_TOKEN,
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


def _check_special(special: list[str]) -> None:
    taken = ["<unk>", "<s>", "</s>", *special]
    for text in special:
        if not text or taken.count(text) > 1 or re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            raise DataError(
                f"special token {text!r} is empty, occurs twice or has a fixed meaning; choose texts such as <|user|>"
            )
        if "," in text or text.strip() != text:
            raise DataError(
                f"special token {text!r} has a comma or a space at its end, which sentencepiece cannot take"
            )


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
