"""Input files of any kind: found by name, folder or glob, opened as a stream of bytes.

What a file holds shows in its name: `.jsonl`, `.json` and `.ndjson` one JSON object a line, `.parquet` a table, `.txt`,
`.text` and `.md` one document; `.gz` and `.zst` behind it mean that it is compressed.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

from megagpt.errors import DataError

Format = Literal["jsonl", "text", "parquet"]
FORMATS: tuple[str, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Input:
    """One file: what it holds, and what tells whether it has changed."""

    path: str
    format: Format
    compression: str
    """"", ".gz" or ".zst"."""
    bytes: int
    modified_ns: int

    @property
    def can_be_cut(self) -> bool:
        """Whether its documents can be read from the middle on."""
        return self.format == "parquet" or (self.format == "jsonl" and not self.compression)


def find_inputs(paths: Iterable[str | Path], input_format: Format | None = None) -> list[Input]:
    """The files that names, folders (with all below them) and globs (`**` too) stand for.

    The order is that of `paths`; what one folder or glob stands for is sorted by path. Hidden files, and files in a
    folder whose names say nothing, are passed over.

    Args:
        paths: files, folders and globs.
        input_format: what all files hold, whatever their names say.

    Raises:
        DataError: nothing was given or found, a file is unreadable, given twice or of an unknown kind.
    """
    names = [name for path in paths for name in _expand(str(path), input_format)]
    if not names:
        raise DataError("no input file was given; give one file, folder or glob or more")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"input {name} is given twice; give each file once")
        seen.add(name)
    return [_describe(name, input_format) for name in names]


def _expand(name: str, input_format: Format | None) -> list[str]:
    path = Path(name)
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(str(p) for p in below if p.is_file() and (input_format or _format_of(p.name)))
        if not found:
            raise DataError(
                f"input folder {name} holds no file that ends in {_known()}; give another or --input-format"
            )
        return found
    if glob.has_magic(name) and not path.exists():
        found = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not found:
            raise DataError(f"input {name} stands for no file; mend the pattern")
        return found
    return [name]


def _describe(name: str, input_format: Format | None) -> Input:
    found = input_format or _format_of(name)
    if found is None:
        raise DataError(f"input {name} does not end in {_known()}; rename it or say what it holds by --input-format")
    with open_input(name) as file:
        status = os.fstat(file.fileno())
    return Input(name, found, _compression_of(name), status.st_size, status.st_mtime_ns)


def _known() -> str:
    return f"{', '.join(_SUFFIXES)} (with {' or '.join(_COMPRESSIONS)} behind it if compressed)"


def _compression_of(name: str) -> str:
    return next((suffix for suffix in _COMPRESSIONS if name.lower().endswith(suffix)), "")


def _format_of(name: str) -> Format | None:
    bare = name.lower().removesuffix(_compression_of(name))
    return next((kind for suffix, kind in _SUFFIXES.items() if bare.endswith(suffix)), None)


def open_input(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes as they are on disk.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror}); give files that can") from None


@contextmanager
def decompressed(source: Input) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """The content of a file, decompressed on the way, and the file itself (whose position shows the progress).

    Raises:
        DataError: on opening or (from within the block) on reading: unreadable, damaged or cut off, library missing.
    """
    with open_input(source.path) as file:
        try:
            if source.compression == ".gz":
                yield io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), 1 << 20), file
            elif source.compression == ".zst":
                yield io.BufferedReader(_WholeZstd(source.path, file), 1 << 20), file
            else:
                yield cast(io.BufferedReader, file), file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(source.path, file, error) from None
        except Exception as error:  # zstandard's own error, known only where it is installed
            if type(error).__name__ != "ZstdError":
                raise
            raise _damaged(source.path, file, error) from None


def _damaged(path: str, file: BinaryIO, error: Exception) -> DataError:
    return DataError(
        f"{path}: the compressed data is damaged or cut off near byte {file.tell()} ({error}); fetch the file again"
    )


class _WholeZstd(io.RawIOBase):
    """A zstd stream of any number of frames, which must end with the end of a frame (the library does not check it)."""

    def __init__(self, path: str, file: BinaryIO):
        try:
            import zstandard
        except ModuleNotFoundError:
            raise DataError(f"{path} needs the zstandard library; run pip install 'megagpt[data]'") from None
        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = self._new()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = self._new(), False
            content = content or self._file.read(1 << 16)
            if not content:
                if self._in_frame:
                    raise EOFError("the last frame has no end")
                return 0
            self._in_frame = True
            self._ready = memoryview(self._frame.decompress(content))
            if self._frame.eof and not self._frame.unused_data:
                self._frame, self._in_frame = self._new(), False
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
