"""Token files in Megatron's .bin/.idx format: writer and validating memory-mapped reader.

`PREFIX.bin`: the tokens of all documents one after the other, little-endian, nothing else.

`PREFIX.idx`, little-endian:

    bytes       type       content
    9           bytes      magic "MMIDIDX\\0\\0"
    8           u64        version, 1
    1           u8         code of the token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    8           u64        N, number of sequences
    8           u64        D, number of documents + 1
    4 N         i32[N]     tokens of each sequence
    8 N         i64[N]     byte at which each sequence starts in .bin
    8 D         i64[D]     first sequence of each document, and N at the end
    N           i8[N]      modes; only in multimodal files, without any flag: the file's size tells

Megatron's reader trusts this header; text comes out wrong when .bin and .idx do not belong together. The reader
here checks everything that can be checked without reading .bin; a hash of both files is in the manifest.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megagpt.data.document_lengths import DocumentLengths
from megagpt.data.opening import bin_path, dataset_file, idx_path, local_index, open_tokens, size_of
from megagpt.errors import DataError
from megagpt.storage.cache import Cache
from megagpt.storage.local import publish, temporary_name

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_ROWS_PER_CHUNK = 1 << 20
_FIX = "rebuild both files with tools/preprocess_data.py"
# Megatron's bound, a little below 2**16.
_U16_VOCABULARY = 65500


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """Token type of a dataset: u16 for vocabularies below 65,500, else i32 (Megatron's rule)."""
    return np.dtype("<u2") if vocab_size < _U16_VOCABULARY else np.dtype("<i4")


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx, which appear only when the `with` block ends without an error.

    Memory does not grow: lengths wait in a file.

    Attributes:
        num_documents, num_tokens: written so far.
        bin_sha256, idx_sha256: hashes of the files, set by `close`.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, empty_documents_have_a_sequence: bool = True):
        """Open temporary files beside the final ones; the folder is created.

        Args:
            prefix: path of the dataset without .bin.
            vocab_size: number of tokens of the tokenizer.
            empty_documents_have_a_sequence: False writes a document without tokens as one without sequences, as
                Megatron-LM's preprocess_data.py does.

        Raises:
            OSError: the folder cannot be written.
        """
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._vocab_size = vocab_size
        self.dtype = dtype_for_vocabulary(vocab_size)
        self.num_documents = 0
        self.num_tokens = 0
        self.bin_sha256 = ""
        self.idx_sha256 = ""
        self._skips_empty = not empty_documents_have_a_sequence
        self._num_sequences = 0
        self._hash = hashlib.sha256()
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = temporary_name(self._bin).open("wb")
        self._lengths = self._lengths_name().open("w+b")

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            DataError: a token is outside the vocabulary.
            OSError: the disk is full or gone.
        """
        self.add_many(np.asarray(tokens, dtype=np.int64), np.array([len(tokens)], dtype=np.int32))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose tokens lie one after the other.

        Args:
            tokens: integers [sum of lengths].
            lengths: int32 [documents].

        Raises:
            DataError: a token is outside the vocabulary.
            OSError: the disk is full or gone.
        """
        assert int(lengths.sum(dtype=np.int64)) == tokens.size, "lengths must cover the tokens"
        self.add_tokens(tokens)
        self.add_lengths(lengths)

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens, integers [tokens], whose lengths come by `add_lengths`.

        Raises:
            DataError: a token is outside the vocabulary.
            OSError: the disk is full or gone.
        """
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            culprit = int(tokens.max()) if tokens.max() >= self._vocab_size else int(tokens.min())
            raise DataError(
                f"{self._bin}: token {culprit} is outside the vocabulary of {self._vocab_size};"
                " write the dataset with the tokenizer that made the tokens"
            )
        content = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._file.write(content)
        self._hash.update(content)
        self.num_tokens += int(tokens.size)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Append documents of so many tokens each, int32 [documents].

        Raises:
            OSError: the disk is full or gone.
        """
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        self.num_documents += len(lengths)
        self._num_sequences += int(np.count_nonzero(lengths)) if self._skips_empty else len(lengths)

    def finish(self) -> None:
        """Put both files on disk under temporary names; what is left for `close` needs no more space.

        Raises:
            OSError: the disk is full or gone.
        """
        assert self._file_covers_lengths(), "lengths must cover the tokens"
        _sync_and_close(self._file)
        with temporary_name(self._idx).open("wb") as file:
            self.idx_sha256 = self._write_index(file)
            _sync_and_close(file)
        self.bin_sha256 = self._hash.hexdigest()

    def close(self) -> None:
        """Put both files on disk under their final names; an old index goes first, so that it never meets new tokens.

        Raises:
            OSError: the disk is full or gone; nothing is left under the final names, or what was there before.
        """
        try:
            if not self.bin_sha256:
                self.finish()
            self._idx.unlink(missing_ok=True)
            publish(temporary_name(self._bin), self._bin)
            publish(temporary_name(self._idx), self._idx)
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove the temporary files; harmless after `close`."""
        self._file.close()
        self._lengths.close()
        self._lengths_name().unlink(missing_ok=True)
        temporary_name(self._bin).unlink(missing_ok=True)
        temporary_name(self._idx).unlink(missing_ok=True)

    def _lengths_name(self) -> Path:
        return temporary_name(self._idx.with_name(f"{self._idx.name}.lengths"))

    def _file_covers_lengths(self) -> bool:
        return sum(int(lengths.sum()) for lengths in self._document_chunks()) == self.num_tokens

    def _document_chunks(self) -> Iterator[np.ndarray]:
        """Lengths of all documents, int64, some at a time."""
        self._lengths.seek(0)
        while content := self._lengths.read(4 * _ROWS_PER_CHUNK):
            yield np.frombuffer(content, dtype="<i4").astype(np.int64)

    def _sequence_chunks(self) -> Iterator[np.ndarray]:
        """Lengths of all sequences, int64, some at a time."""
        for lengths in self._document_chunks():
            yield lengths[lengths > 0] if self._skips_empty else lengths

    def _write_index(self, file) -> str:
        digest = hashlib.sha256()

        def put(content: Any) -> None:
            file.write(content)
            digest.update(content)

        put(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self._num_sequences, self.num_documents + 1))
        for lengths in self._sequence_chunks():
            put(lengths.astype("<i4").data)
        start = 0
        for lengths in self._sequence_chunks():
            ends = start + np.cumsum(lengths) * self.dtype.itemsize
            put((ends - lengths * self.dtype.itemsize).astype("<i8", copy=False).data)
            start = int(ends[-1]) if len(ends) else start
        first = np.zeros(1, dtype=np.int64)
        put(first.astype("<i8").data)
        for lengths in self._document_chunks():
            behind = first[-1] + np.cumsum(lengths > 0 if self._skips_empty else np.ones_like(lengths))
            put(behind.astype("<i8", copy=False).data)
            first = behind
        return digest.hexdigest()


def _sync_and_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class IndexedDataset(DocumentLengths):
    """Tokens and index of one prefix, checked on opening; memory-mapped, or read through a cache.

    Attributes:
        prefix: as given.
        dtype: type of the tokens on disk.
        num_documents: documents (each of one or more sequences).
        num_tokens: tokens of all documents.
    """

    def __init__(
        self, prefix: str | Path, check_rows: bool = True, cache: Cache | None = None, idx_sha256: str | None = None
    ):
        """Open and check PREFIX.bin and PREFIX.idx.

        Args:
            check_rows: check each row of the index, which takes time that grows with the number of documents. False is
                for datasets whose manifest tells that the index was once whole: header, sizes and ends are checked
                here, and each row when it is used.
            cache: for a dataset in an object store.
            idx_sha256: of an index in an object store, compared when it is fetched.

        Raises:
            DataError: a file is missing, truncated or damaged, or the two do not belong together.
            StorageError: the store refuses or does not answer.
        """
        self.prefix = str(prefix)
        self._bin, self._idx = dataset_file(prefix, ".bin"), dataset_file(prefix, ".idx")
        for path in (self._bin, self._idx):
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist; data.prefix is the path without .bin/.idx,"
                    " and tools/preprocess_data.py writes both files"
                )
        cache = cache or Cache()
        self._read_index(local_index(self._idx, cache, idx_sha256))
        self._check_ends()
        if check_rows:
            self._check_index()
        self.num_tokens = self._check_bin_size()
        self._tokens = open_tokens(self._bin, self.dtype, self.num_tokens, cache)

    @property
    def document_offsets(self) -> np.ndarray:
        """First token of each document in the flat stream and the end: int64 [num_documents + 1], computed anew."""
        starts = np.append(self._pointers, self.num_tokens * self.dtype.itemsize)
        return starts[self._documents] // self.dtype.itemsize

    def document_start(self, index: int) -> int:
        """First token of document `index` in the flat stream; num_tokens for index num_documents.

        Raises:
            IndexError: there is no such document.
            DataError: its rows of the index do not fit their neighbours.
        """
        if not 0 <= index <= self.num_documents:
            raise IndexError(f"document {index} is outside 0 to {self.num_documents} of {self.prefix}")
        row = int(self._documents[index])
        before = int(self._documents[index - 1]) if index else 0
        if not before <= row <= len(self._lengths):
            raise DataError(f"{self._idx}: document {index - 1} ends before it starts, or behind the end; {_FIX}")
        expected = int(self._pointers[row - 1]) + int(self._lengths[row - 1]) * self.dtype.itemsize if row else 0
        found = int(self._pointers[row]) if row < len(self._pointers) else self._bytes
        if found != expected or not 0 <= found <= self._bytes:
            raise DataError(
                f"{self._idx}: sequence {row} starts at byte {found}, expected {expected} from the one before; {_FIX}"
            )
        return found // self.dtype.itemsize

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, in the type on disk, [tokens of the document]; a read-only view.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside 0 to {self.num_documents - 1} of {self.prefix}")
        start, stop = self.document_start(index), self.document_start(index + 1)
        if stop < start:
            raise DataError(f"{self._idx}: document {index} ends before it starts; {_FIX}")
        return self.tokens(start, stop)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 of the flat stream, in the type on disk, [stop - start]; a read-only view.

        Raises:
            IndexError: the range is not inside the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} are outside the {self.num_tokens} tokens of {self.prefix}")
        return self._tokens[start:stop]

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise DataError(f"{self._idx} does not start with {MAGIC!r} but with {header[: len(MAGIC)]!r}; {_FIX}")
        if len(header) < _HEADER.size:
            raise DataError(f"{self._idx} is truncated: its header has {_HEADER.size} bytes, found {size}; {_FIX}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{self._idx} has version {version}, only {VERSION} is known; {_FIX}")
        if code not in _TYPES:
            raise DataError(f"{self._idx} has token type code {code}, expected one of {sorted(_TYPES)}; {_FIX}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):
            raise DataError(
                f"{self._idx} has {size} bytes, expected {expected} for {sequences} sequences"
                f" and {documents - 1} documents; {_FIX}"
            )
        if documents < 1:
            raise DataError(f"{self._idx} has no document indices, expected at least one; {_FIX}")
        self.dtype = np.dtype(_TYPES[code])
        self.num_documents = documents - 1
        content = np.memmap(path, dtype=np.uint8, mode="r")
        at_pointers = _HEADER.size + 4 * sequences
        at_documents = at_pointers + 8 * sequences
        self._lengths = content[_HEADER.size : at_pointers].view("<i4")
        self._pointers = content[at_pointers:at_documents].view("<i8")
        self._documents = content[at_documents : at_documents + 8 * documents].view("<i8")

    def _check_ends(self) -> None:
        first, last = int(self._documents[0]), int(self._documents[-1])
        if (first, last) != (0, len(self._lengths)):
            raise DataError(
                f"{self._idx}: the document indices run from {first} to {last}, expected 0 to the"
                f" {len(self._lengths)} sequences; {_FIX}"
            )
        self._bytes = 0
        if len(self._lengths):
            self._bytes = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize

    def _check_index(self) -> None:
        start = 0
        for at in range(0, len(self._lengths), _ROWS_PER_CHUNK):
            lengths = np.asarray(self._lengths[at : at + _ROWS_PER_CHUNK], dtype=np.int64)
            if lengths.min() < 0:
                row = int(lengths.argmin())
                raise DataError(f"{self._idx}: sequence {at + row} has a length of {lengths[row]}, below zero; {_FIX}")
            ends = start + np.cumsum(lengths) * self.dtype.itemsize
            expected = np.concatenate([[start], ends[:-1]])
            found = self._pointers[at : at + _ROWS_PER_CHUNK]
            if not np.array_equal(found, expected):
                row = int(np.flatnonzero(found != expected)[0])
                raise DataError(
                    f"{self._idx}: sequence {at + row} starts at byte {found[row]}, expected {expected[row]}"
                    f" from the lengths before it; {_FIX}"
                )
            start = int(ends[-1])
        for at in range(0, self.num_documents, _ROWS_PER_CHUNK):
            steps = np.diff(self._documents[at : at + _ROWS_PER_CHUNK + 1])
            if steps.min() < 0:
                raise DataError(f"{self._idx}: document {at + int(steps.argmin())} ends before it starts; {_FIX}")

    def _check_bin_size(self) -> int:
        size = size_of(self._bin)
        if size != self._bytes:
            raise DataError(
                f"{self._bin} has {size} bytes, expected {self._bytes} from {self._idx.name}:"
                f" a file is truncated or the two do not belong together; {_FIX}"
            )
        return size // self.dtype.itemsize
