"""What a worker does: one unit of the inputs to tokens and lengths in files of their own.

A unit's files are `NUMBER.KEY.tokens`, `NUMBER.KEY.lengths` (int32 for each document) and, written last, `NUMBER.json`,
which says that the others are complete. Nothing waits for the disk here: `NUMBER.json` holds the hashes of the others,
which are compared when the units are merged.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash

from megagpt.data.documents import Document, Fragments, Part, read_documents
from megagpt.data.files import write_whole
from megagpt.data.indexed import dtype_for_vocabulary
from megagpt.data.inputs import Input
from megagpt.data.jsonl import BadLineError
from megagpt.data.long_texts import LONG_CHARACTERS, cut_into_pieces
from megagpt.errors import DataError
from megagpt.tokenization.codec import Codec
from megagpt.tokenization.gigatoken_codec import fast_codec
from megagpt.tokenization.special_in_text import with_special_in_text
from megagpt.tokenization.tokenizer import Tokenizer

OnBadLine = Literal["error", "skip"]
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 4096
_LONGEST_DOCUMENT = (1 << 31) - 1  # lengths are int32 in the format
_NO_LENGTHS = np.empty(0, dtype=np.int32)
Report = Callable[[int, int], None]
"""Is told how many bytes of input are done and how many tokens they gave."""


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens."""

    tokenizer: str
    text_keys: tuple[str, ...]
    append_eod: bool
    min_length: int
    on_bad_line: OnBadLine
    threads: int
    fast: bool
    """Whether gigatoken encodes."""
    special_tokens_in_text: bool = False
    """Whether special tokens that a text spells out mean themselves; those of tokenizer.json do so anyway, unless it
    says otherwise."""


@dataclass(frozen=True)
class Done:
    """What a unit came to."""

    documents: int
    tokens: tuple[int, ...]
    """For each key."""
    hashes: tuple[dict[str, str], ...]
    """For each key: of its `tokens` and its `lengths` (xxh3_128)."""
    skipped_short: int
    skipped_bad: int


class _Output:
    """Tokens and lengths of one key of a unit."""

    def __init__(self, stem: Path, key: int, dtype: np.dtype):
        self._tokens: BinaryIO = open(f"{stem}.{key}.tokens", "w+b", 1 << 20)  # noqa: SIM115
        self._lengths: BinaryIO = open(f"{stem}.{key}.lengths", "wb")  # noqa: SIM115
        self._tokens_hash, self._lengths_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        self.dtype = dtype
        self.num_tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._tokens.write(tokens.data)
        self._tokens_hash.update(tokens.data)
        self._lengths.write(lengths.data)
        self._lengths_hash.update(lengths.data)
        self.num_tokens += len(tokens)

    def forget_tokens(self, down_to: int) -> None:
        """Take back tokens that have no length yet."""
        self._tokens.truncate(down_to * self.dtype.itemsize)
        self._tokens.seek(0)
        self._tokens_hash.reset()
        while content := self._tokens.read(1 << 20):
            self._tokens_hash.update(content)
        self.num_tokens = down_to

    def hashes(self) -> dict[str, str]:
        return {"tokens": self._tokens_hash.hexdigest(), "lengths": self._lengths_hash.hexdigest()}

    def close(self) -> None:
        self._tokens.close()
        self._lengths.close()


class Encoder:
    """Turns documents into tokens; one per process."""

    def __init__(self, encoding: Encoding, codec: Codec):
        """Use a codec; see `load` to get one."""
        self.encoding = encoding
        self._codec = with_special_in_text(codec) if encoding.special_tokens_in_text else codec
        self.dtype = dtype_for_vocabulary(codec.vocab_size)
        self._before = np.array(codec.special.prefix, dtype=self.dtype)
        self._behind = np.array(codec.special.suffix, dtype=self.dtype)
        self._eod = np.array([codec.special.eod] if encoding.append_eod else [], dtype=self.dtype)

    @classmethod
    def load(cls, encoding: Encoding) -> "Encoder":
        """Load the tokenizer.

        Raises:
            DataError: it cannot be loaded.
        """
        tokenizer = Tokenizer.load(encoding.tokenizer)
        codec: Codec | None = tokenizer.codec
        if encoding.fast:
            codec, reason = fast_codec(tokenizer, ())
            if codec is None:
                raise DataError(f"{reason}; start again with --backend reference")
        assert codec is not None, "each tokenizer has one"
        return cls(encoding, codec)

    def encode_unit(
        self, number: int, parts: Iterable[Part], inputs: Sequence[Input], folder: Path, report: Report
    ) -> Done:
        """Write the files of one unit into `folder`.

        Raises:
            DataError: an input is unreadable or, unless skipped, a line is no document.
            OSError: the disk is full or gone.
        """
        stem = folder / f"{number:08d}"
        outputs = [_Output(stem, key, self.dtype) for key in range(len(self.encoding.text_keys))]
        try:
            unit = _Unit(self, outputs, report)
            for part in parts:
                source = inputs[part.file]
                for document in read_documents(source, part.start, part.stop, self.encoding.text_keys, str(folder)):
                    unit.add(document)
            done = unit.finish()
        finally:
            for output in outputs:
                output.close()
        write_whole(Path(f"{stem}.json"), json.dumps(asdict(done)).encode(), durable=False)
        return done

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, without anything around them."""
        return self._codec.encode_arrays(texts, self.encoding.threads)

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts one after the other, and the length of each, int32 [texts]."""
        found = self.encode(texts)
        around = len(self._before) + len(self._behind)
        lengths = np.fromiter(map(len, found), dtype=np.int32, count=len(found)) + np.int32(around)
        lengths += (lengths > 0) * np.int32(len(self._eod))
        before = [self._before] if len(self._before) else []
        behind = [part for part in (self._behind, self._eod) if len(part)]
        parts = [part for ids in found if around or len(ids) for part in (*before, ids, *behind)]
        # Ids of any integer type; the tokenizer's vocabulary has decided the type on disk.
        tokens = np.concatenate([*parts, self._eod[:0]], dtype=self.dtype, casting="unsafe")
        return tokens, lengths

    def encode_long(self, fragments: Iterable[str], put: Callable[[np.ndarray, int], None]) -> int:
        """Pass the tokens of one long document to `put`, some at a time with the number of their characters; returns
        how many there are."""
        put(self._before, 0)
        length = len(self._before)
        for piece in cut_into_pieces(fragments, self.encode):
            (ids,) = self.encode([piece])
            put(ids.astype(self.dtype), len(piece))
            length += len(ids)
        end = np.concatenate([self._behind, self._eod if length + len(self._behind) else self._eod[:0]])
        put(end, 0)
        return length + len(end)


class _Unit:
    """Collects short documents into batches; counts."""

    def __init__(self, encoder: Encoder, outputs: list[_Output], report: Report):
        self._encoder, self._outputs, self._report = encoder, outputs, report
        self._encoding = encoder.encoding
        self._texts: list[Sequence[Any]] = []
        self._characters = self._bytes = 0
        self._reported_tokens = 0
        self._documents = self._short = self._bad = 0

    def add(self, document: Document) -> None:
        """Take a document on."""
        if document.fault is not None:
            self._bytes += document.num_bytes
            self._refuse(document, document.fault)
            return
        characters, is_long = 0, False
        for text in document.texts:
            if not isinstance(text, str):
                is_long = True
            elif len(text) < self._encoding.min_length:
                self._bytes += document.num_bytes
                self._short += 1
                return
            else:
                characters += len(text)
                is_long = is_long or len(text) > LONG_CHARACTERS
        if is_long:
            self._flush()
            self._add_long(document)
            return
        self._bytes += document.num_bytes
        self._documents += 1
        self._texts.append(document.texts)
        self._characters += characters
        if self._characters >= _BATCH_CHARACTERS or len(self._texts) >= _BATCH_DOCUMENTS:
            self._flush()

    def finish(self) -> Done:
        """Encode what is left."""
        self._flush()
        tokens = tuple(output.num_tokens for output in self._outputs)
        hashes = tuple(output.hashes() for output in self._outputs)
        return Done(self._documents, tokens, hashes, self._short, self._bad)

    def _flush(self) -> None:
        if self._texts:
            for output, texts in zip(self._outputs, zip(*self._texts, strict=True), strict=True):
                output.add(*self._encoder.encode_documents(list(texts)))
        self._tell(self._bytes)
        self._texts, self._characters, self._bytes = [], 0, 0

    def _tell(self, num_bytes: int) -> None:
        tokens = sum(output.num_tokens for output in self._outputs)
        self._report(num_bytes, tokens - self._reported_tokens)
        self._reported_tokens = tokens

    def _add_long(self, document: Document) -> None:
        starts = [output.num_tokens for output in self._outputs]
        lengths: list[int] = []
        left = document.num_bytes

        def put(tokens: np.ndarray, characters: int, output: _Output) -> None:
            nonlocal left
            output.add(tokens, _NO_LENGTHS)
            told = min(left, characters)  # a character takes a byte or more
            self._tell(told)
            left -= told

        try:
            for output, text in zip(self._outputs, document.texts, strict=True):
                lengths.append(self._encoder.encode_long(_in_fragments(text), partial(put, output=output)))
                if lengths[-1] > _LONGEST_DOCUMENT:
                    raise BadLineError(f"a document of {lengths[-1]} tokens, more than the format can hold")
        except BadLineError as fault:
            for output, start in zip(self._outputs, starts, strict=True):
                output.forget_tokens(start)
            self._refuse(document, fault)
            return
        finally:
            self._bytes += left
        self._documents += 1
        for output, length in zip(self._outputs, lengths, strict=True):
            output.add(np.empty(0, dtype=output.dtype), np.array([length], dtype=np.int32))

    def _refuse(self, document: Document, fault: BadLineError) -> None:
        if self._encoding.on_bad_line == "error":
            raise document.error(fault)
        self._bad += 1


def _in_fragments(text: str | Fragments) -> Iterable[str]:
    if not isinstance(text, str):
        return text()
    return (text[at : at + LONG_CHARACTERS] for at in range(0, len(text), LONG_CHARACTERS))
