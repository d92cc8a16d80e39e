"""Text files with one JSON object a line: where the lines are, and what is wrong with one."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.manifest import InputFile
from megagpt.errors import DataError
from megagpt.tokenization.tokenizer import encoding_fault

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """Whole lines of one file: `num_bytes` from byte `offset`, of which the first is line `first_line` (from 1)."""

    path: str
    offset: int
    num_bytes: int
    first_line: int


class BadLineError(Exception):
    """A line is no document; the message says why."""


def scan_spans(path: str | Path) -> tuple[list[Span], InputFile]:
    """Cut a file into spans of about 1 MiB that end at line ends, and hash it on the way.

    Raises:
        DataError: the file is missing or unreadable.
    """
    spans: list[Span] = []
    digest = hashlib.sha256()
    offset = start = 0
    first_line = next_line = 1
    with open_input(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            line_end = chunk.rfind(b"\n") + 1
            if line_end:
                spans.append(Span(str(path), start, offset + line_end - start, first_line))
                next_line += chunk.count(b"\n")
                start, first_line = offset + line_end, next_line
            offset += len(chunk)
    if start < offset:
        spans.append(Span(str(path), start, offset - start, first_line))
    return spans, InputFile(str(path), offset, digest.hexdigest())


def read_lines(span: Span) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a span that are not blank: line number, byte offset in the file and content with its line end.

    Raises:
        DataError: the file has shrunk or gone since it was scanned.
    """
    with open_input(span.path) as file:
        file.seek(span.offset)
        content = file.read(span.num_bytes)
    if len(content) != span.num_bytes:
        raise DataError(f"{span.path} has become shorter while it was read; start again when it is complete")
    offset = span.offset
    # Not splitlines(), which would also cut at a lone carriage return.
    for number, line in enumerate(content.split(b"\n"), start=span.first_line):
        if line.strip():
            yield number, offset, line
        offset += len(line) + 1


def open_input(path: str | Path):
    """Open an input file for reading bytes.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror}); give JSONL files") from None


def parse_text(line: bytes, text_key: str) -> str:
    """The text of one line.

    Raises:
        BadLineError: the line is not UTF-8, not a JSON object, or has no string under `text_key`.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte {error.start} of the line is not UTF-8") from None
    except ValueError as error:
        raise BadLineError(f"not JSON ({error})") from None
    except RecursionError:
        raise BadLineError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise BadLineError(f"not a JSON object but {type(record).__name__}")
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise BadLineError(f"no key {text_key!r} (keys: {keys})")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadLineError(f"the value of {text_key!r} is not a string but {type(text).__name__}")
    if (fault := encoding_fault(text)) is not None:
        raise BadLineError(f"{text_key!r} is not valid Unicode: {fault}")
    return text


def bad_line(path: str, number: int, error: BadLineError) -> DataError:
    """The error to raise for a line that is no document."""
    return DataError(f"{path}:{number}: {error}; mend the line or pass --on-bad-line skip")


def iter_texts(paths: list[str], text_key: str = "text", on_bad_line: str = "error") -> Iterator[str]:
    """Texts of all lines of all files in order.

    Args:
        paths: JSONL files.
        text_key: key of the text in each object.
        on_bad_line: "error" or "skip".

    Raises:
        DataError: a file is unreadable or, unless skipped, a line is no document.
    """
    for path in paths:
        with open_input(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield parse_text(line, text_key)
                except BadLineError as error:
                    if on_bad_line == "error":
                        raise bad_line(path, number, error) from None


class LineTable:
    """Where each line of all files is, 28 bytes a line; makes a random order of documents possible."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._file, self._offset, self._size, self._number = array("i"), array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._offset)

    def add(self, span: Span) -> None:
        """Enter all lines of a span that are not blank."""
        if not self._paths or self._paths[-1] != span.path:
            self._paths.append(span.path)
        for number, offset, line in read_lines(span):
            self._file.append(len(self._paths) - 1)
            self._offset.append(offset)
            self._size.append(len(line))
            self._number.append(number)

    def span(self, row: int) -> Span:
        """The span of one line."""
        return Span(self._paths[self._file[row]], self._offset[row], self._size[row], self._number[row])
