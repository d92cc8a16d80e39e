"""JSON lines of any length in bounded memory.

A line that is longer than a bound is copied to an unnamed file. Its long string values are replaced by short
placeholders; what remains is parsed as any other line, so that the same things are accepted and refused. The value of a
placeholder is then read from the file in fragments.
"""

import codecs
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from megagpt.data.jsonl import BadLineError, parse_string
from megagpt.tokenization.tokenizer import encoding_fault

_CHUNK_BYTES = 1 << 20
LONG_STRING_BYTES = 1 << 16
"""Longer string values are read in fragments."""
_LARGEST_REST_BYTES = 1 << 26


class LongLine:
    """A line in a file of its own.

    Attributes:
        reduced: the line with placeholders for long strings.
    """

    def __init__(self, start: bytes, rest: BinaryIO, folder: str | None = None):
        """Copy a line: its first bytes, and what follows up to a line end or the end of `rest`.

        Args:
            start: what has been read of the line.
            rest: a stream behind `start`; is left behind the line.
            folder: where the unnamed file lives.

        Raises:
            OSError: the disk is full.
        """
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by close()
        self._mark = f"long string {secrets.token_hex(8)} "
        self.num_bytes = 0
        part = start
        while part:
            self._file.write(part)
            self.num_bytes += len(part)
            part = b"" if part.endswith(b"\n") else rest.readline(_CHUNK_BYTES)
        self._ranges: list[tuple[int, int]] = []

    def close(self) -> None:
        """Remove the copy."""
        self._file.close()

    def reduce(self) -> bytes:
        """The line with a placeholder for each long string.

        Raises:
            BadLineError: a string has no end, or the line is too long without its long strings.
        """
        self._file.seek(0)
        self._ranges = []
        kept: list[bytes] = []
        kept_bytes = at = 0
        while True:
            outside, found = self._read_to_quote()
            kept.append(outside)
            at += len(outside)
            if not found:
                return b"".join(kept)
            first = at
            content, length = self._read_string(first)
            if content is None:
                self._ranges.append((first, first + length))
                content = f"{self._mark}{len(self._ranges) - 1}".encode()
            kept.append(content + b'"')
            at = first + length + 1
            self._file.seek(at)
            kept_bytes += len(outside) + len(content) + 1
            if kept_bytes > _LARGEST_REST_BYTES:
                raise BadLineError(f"more than {_LARGEST_REST_BYTES >> 20} MiB beside its long strings")

    def fragments(self, value: str) -> Iterator[str] | None:
        """The text behind a placeholder in fragments; None if the value is none.

        Raises:
            BadLineError: (while iterating) the string is not UTF-8 or not a JSON string.
        """
        if not value.startswith(self._mark):
            return None
        first, end = self._ranges[int(value.removeprefix(self._mark))]
        return self._decode(first, end)

    def check(self, but: Sequence[str] = ()) -> None:
        """Read all long strings, but those whose placeholders are among `but`, which will be read anyway.

        Raises:
            BadLineError: one of them is not UTF-8 or not a JSON string.
        """
        for number, (first, end) in enumerate(self._ranges):
            for _ in self._decode(first, end) if f"{self._mark}{number}" not in but else ():
                pass

    def _read_to_quote(self) -> tuple[bytes, bool]:
        """Bytes up to and with the next quote, and whether there is one; leaves the file anywhere behind."""
        start = self._file.tell()
        parts: list[bytes] = []
        size = 0
        while chunk := self._file.read(4096 if not parts else _CHUNK_BYTES):
            quote = chunk.find(b'"')
            parts.append(chunk if quote < 0 else chunk[: quote + 1])
            size += len(parts[-1])
            if quote >= 0:
                self._file.seek(start + size)
                return b"".join(parts), True
            if size > _LARGEST_REST_BYTES:
                raise BadLineError(f"more than {_LARGEST_REST_BYTES >> 20} MiB without a string")
        return b"".join(parts), False

    def _read_string(self, first: int) -> tuple[bytes | None, int]:
        """Content of the string that starts at `first` (None: it is long), and its length in bytes."""
        carry, length = b"", 0
        begun: bytes | None = b""
        while chunk := self._file.read(_CHUNK_BYTES if length else LONG_STRING_BYTES):
            chunk = carry + chunk
            inside, ends = _inside(chunk)
            length += inside
            if begun is not None:
                begun = begun + chunk[:inside] if length <= LONG_STRING_BYTES else None
            if ends:
                return begun, length
            carry = chunk[inside:]
        raise BadLineError(f"the string from byte {first} has no end")

    def _decode(self, first: int, end: int) -> Iterator[str]:
        self._file.seek(first)
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = held = ""
        at = first
        while at < end:
            self._file.seek(at)  # another reader may have moved it
            chunk = self._file.read(min(_CHUNK_BYTES, end - at))
            at += len(chunk)
            try:
                text = rest + decoder.decode(chunk, final=at == end)
            except UnicodeDecodeError as error:
                raise BadLineError(f"byte {at - len(chunk) + error.start} of the line is not UTF-8") from None
            complete = len(text) if at == end else _complete(text)
            usable, rest = text[:complete], text[complete:]
            try:
                fragment = held + parse_string(usable)
            except ValueError as error:
                raise BadLineError(f"not JSON in the string from byte {first} ({error})") from None
            # Halves of a surrogate pair may lie on both sides of a border.
            if held:
                fragment = fragment.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            held = fragment[-1:] if "\ud800" <= fragment[-1:] <= "\udbff" and at < end else ""
            fragment = fragment.removesuffix(held)
            if (fault := encoding_fault(fragment)) is not None:
                raise BadLineError(f"the string from byte {first} is not valid Unicode: {fault}")
            if fragment:
                yield fragment


def _inside(content: bytes) -> tuple[int, bool]:
    """How many bytes lie inside of a string (the first is no second half of an escape), and whether it ends there."""
    # of the same length, and far faster than a regular expression
    bare = content.replace(rb"\\", b"..").replace(rb"\"", b"..")
    quote = bare.find(b'"')
    return (quote, True) if quote >= 0 else (len(content) - bare.endswith(b"\\"), False)


def _complete(text: str) -> int:
    """Length of a string's content, from the start of an escape or plain character on, without an unfinished escape."""
    last = text.rfind("\\")
    if last < 0 or last <= len(text) - 6:
        return len(text)
    run = last + 1 - len(text[: last + 1].rstrip("\\"))
    is_complete = run % 2 == 0 or len(text) - last >= (6 if text[last + 1 : last + 2] == "u" else 2)
    return len(text) if is_complete else last
