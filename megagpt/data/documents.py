"""Documents of input files of any kind, one after the other, in bounded memory.

Bounded means: a JSON line or text file of any size is read in fragments; a value of a Parquet file is held as a whole.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from megagpt.data.inputs import Format, Input, decompressed, find_inputs, open_input
from megagpt.data.jsonl import BadLineError, parse_texts
from megagpt.data.long_lines import LongLine
from megagpt.errors import DataError

_CHUNK_BYTES = 1 << 20
LONG_BYTES = 1 << 23
"""Longer lines and text files are read in fragments."""
_ROWS_PER_BATCH = 64
Fragments = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Part:
    """Documents of one file: those whose lines start at byte `start` to `stop` - 1 (JSONL), row groups `start` to
    `stop` - 1 (Parquet), or all (`stop` is -1)."""

    file: int
    start: int = 0
    stop: int = -1


class Document(NamedTuple):
    """Texts of one document, a string or (if long) fragments for each key; or what is wrong with it."""

    texts: Sequence[str | Fragments]
    num_bytes: int
    """How far the file was read for it."""
    locate: Callable[[], str]
    """Says where it is."""
    fault: BadLineError | None = None
    place: int = 0
    """Where it is, without a look into the file: byte of a line (compressed: its number), row, 0 for a text file."""
    record: Callable[[], dict[str, Any]] | None = None
    """All fields (JSONL; Parquet if asked for); None where there is only a text."""

    def error(self, fault: BadLineError) -> DataError:
        """What to raise if this is no document."""
        return DataError(f"{self.locate()}: {fault}; {fault.fix} or pass --on-bad-line skip")


def read_documents(
    source: Input,
    start: int,
    stop: int,
    text_keys: Sequence[str],
    scratch: str | None = None,
    whole_records: bool = False,
) -> Iterator[Document]:
    """Documents of a part of a file; blank lines are none.

    Args:
        source: the file.
        start, stop: see `Part`.
        text_keys: keys (JSONL) or columns (Parquet) of the texts; a text file has its text for each.
        scratch: folder for copies of very long lines; default: the system's for temporary files.
        whole_records: read the other columns of Parquet files too.

    Raises:
        DataError: the file is unreadable or damaged, or a library is missing.
    """
    if source.format == "parquet":
        yield from _read_parquet(source, start, stop, text_keys, whole_records)
    elif source.format == "text":
        yield from _read_text_file(source, len(text_keys))
    else:
        yield from _read_lines(source, start, stop, text_keys, scratch)


def iter_texts(
    paths: Iterable[str], text_key: str = "text", on_bad_line: str = "error", input_format: Format | None = None
) -> Iterator[str]:
    """Texts of all documents of all files in order, each as a whole.

    Args:
        paths: files, folders and globs.
        text_key: key or column of the text.
        on_bad_line: "error" or "skip".
        input_format: what the files hold, whatever their names say.

    Raises:
        DataError: a file is unreadable or, unless skipped, a line is no document.
    """
    for source in find_inputs(paths, input_format):
        for document in read_documents(source, 0, -1, [text_key]):
            try:
                if document.fault is not None:
                    raise document.fault
                (text,) = document.texts
                yield text if isinstance(text, str) else "".join(text())
            except BadLineError as fault:
                if on_bad_line == "error":
                    raise document.error(fault) from None


def _read_lines(
    source: Input, start: int, stop: int, text_keys: Sequence[str], scratch: str | None
) -> Iterator[Document]:
    end = stop if stop >= 0 else float("inf")
    with decompressed(source) as (file, raw):
        # The line that begins before `start` belongs to the part before.
        offset = _skip_to_line_start(file, start, end) if start else 0
        read_to = raw.tell() if source.compression else 0
        number = 0
        while offset < end and (line := file.readline(LONG_BYTES)):
            number += 1
            locate = partial(_locate_line, source, offset, number)
            place = number if source.compression else offset
            long_line = None
            if len(line) == LONG_BYTES and not line.endswith(b"\n"):
                long_line = LongLine(line, file, scratch)
            size = long_line.num_bytes if long_line else len(line)
            offset += size
            if source.compression:
                size, read_to = raw.tell() - read_to, raw.tell()
            if long_line is not None:
                try:
                    yield _parse_long(long_line, text_keys, size, locate, place)
                finally:
                    long_line.close()
            elif not line.isspace():
                record = partial(json.loads, line)
                try:
                    yield Document(parse_texts(line, text_keys), size, locate, place=place, record=record)
                except BadLineError as fault:
                    yield Document((), size, locate, fault, place)


def _skip_to_line_start(file: BinaryIO, start: int, end: float) -> int:
    """Go to the first line that starts at byte `start` or later; returns where that is (from `end` on: not here)."""
    file.seek(start - 1)
    offset = start - 1
    # Many parts may lie inside of one long line; none may read to its end.
    while offset < end and (line := file.readline(_CHUNK_BYTES)):
        offset += len(line)
        if line.endswith(b"\n"):
            break
    return offset


def _locate_line(source: Input, offset: int, number_in_part: int) -> str:
    """`path:line`; lines are counted only when something is wrong."""
    if source.compression:
        return f"{source.path}:{number_in_part}"
    with open_input(source.path) as file:
        left, number = offset, 1
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{source.path}:{number}"


def _parse_long(
    line: LongLine, text_keys: Sequence[str], num_bytes: int, locate: Callable[[], str], place: int
) -> Document:
    try:
        texts = parse_texts(line.reduce(), text_keys)
        line.check(but=texts)
    except BadLineError as fault:
        return Document((), num_bytes, locate, fault, place)
    return Document([_fragments_of(line, text) for text in texts], num_bytes, locate, place=place)


def _fragments_of(line: LongLine, text: str) -> str | Fragments:
    return text if line.fragments(text) is None else partial(_present, line, text)


def _present(line: LongLine, text: str) -> Iterator[str]:
    fragments = line.fragments(text)
    assert fragments is not None, "asked before"
    return fragments


def _read_text_file(source: Input, num_keys: int) -> Iterator[Document]:
    def locate() -> str:
        return source.path

    with decompressed(source) as (file, _):
        start = file.read(LONG_BYTES)
        if len(start) == LONG_BYTES:
            yield Document([partial(_text_fragments, source)] * num_keys, source.bytes, locate)
            return
    try:
        yield Document([start.decode("utf-8")] * num_keys, source.bytes, locate)
    except UnicodeDecodeError as error:
        yield Document((), source.bytes, locate, BadLineError(f"byte {error.start} is not UTF-8"))


def _text_fragments(source: Input) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with decompressed(source) as (file, _):
        at = 0
        while True:
            chunk = file.read(_CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise BadLineError(f"byte {at - pending + error.start} is not UTF-8") from None
            if text:
                yield text
            if not chunk:
                return
            at += len(chunk)


def open_parquet(source: Input) -> Any:
    """A Parquet file, opened by pyarrow.

    Raises:
        DataError: pyarrow is missing or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"{source.path} needs the pyarrow library; run pip install 'megagpt[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(source.path, buffer_size=_CHUNK_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.path} is not a readable Parquet file ({error}); fetch the file again") from None


def _read_parquet(
    source: Input, start: int, stop: int, text_keys: Sequence[str], whole_records: bool
) -> Iterator[Document]:
    file = open_parquet(source)
    import pyarrow

    names = file.schema_arrow.names
    for key in text_keys:
        if key not in names:
            raise DataError(f"{source.path} has no column {key!r} (columns: {', '.join(names)}); pass --json-keys")
        kind = file.schema_arrow.field(key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{source.path}: column {key!r} does not hold strings but {kind}; pass --json-keys")
    groups = range(start, file.num_row_groups if stop < 0 else stop)
    row = sum(file.metadata.row_group(group).num_rows for group in range(start))
    bytes_per_row = source.bytes // max(file.metadata.num_rows, 1)
    try:
        wanted = None if whole_records else list(text_keys)
        for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=groups, columns=wanted, use_threads=False):
            columns = [batch.column(names_at).to_pylist() for names_at in map(batch.schema.get_field_index, text_keys)]
            for at, texts in enumerate(zip(*columns, strict=True)):
                locate = partial("{}: row {}".format, source.path, row)
                place, record = row, partial(_row, batch, at) if whole_records else None
                row += 1
                missing = [key for key, text in zip(text_keys, texts, strict=True) if text is None]
                fault = BadLineError(f"the value of {missing[0]!r} is null") if missing else None
                yield Document(texts, bytes_per_row, locate, fault, place, record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source.path}: damaged near row {row} ({error}); fetch the file again") from None


def _row(batch: Any, at: int) -> dict[str, Any]:
    return batch.slice(at, 1).to_pylist()[0]
