"""Where the files of a dataset are, and how they are opened: on a disk, or in an object store through a cache."""

from pathlib import Path

import numpy as np

from megagpt.errors import DataError, StorageError, exit_code_of
from megagpt.storage import Location, RemotePath, location
from megagpt.storage.cache import Cache, CachedFile


def dataset_file(prefix: str | Path, suffix: str) -> Location:
    """A file of a dataset.

    Args:
        prefix: path or URL without .bin/.idx.
        suffix: `.bin`, `.idx` or `.json`.
    """
    return location(f"{prefix}{suffix}")


def local_file(prefix: str | Path, suffix: str) -> Path:
    """A file of a dataset that is to be written.

    Raises:
        DataError: the prefix is a URL.
    """
    found = dataset_file(prefix, suffix)
    if isinstance(found, RemotePath):
        raise DataError(f"{prefix}: datasets are written to local folders; write it to one and copy its files there")
    return found


def bin_path(prefix: str | Path) -> Path:
    """Path of the tokens that belong to a prefix, to write them."""
    return local_file(prefix, ".bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index that belongs to a prefix, to write it."""
    return local_file(prefix, ".idx")


def size_of(path: Location) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there, or cannot be looked at.
        StorageError: the store refuses or does not answer.
    """
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def local_index(path: Location, cache: Cache, sha256: str | None) -> Path:
    """The index as a local file: itself, or a copy that the processes of a host share.

    Args:
        path: the index.
        cache: for a copy.
        sha256: of the index, as its manifest says; None: not known.

    Raises:
        StorageError: it cannot be fetched, or is another one.
    """
    return cache.whole(path, sha256) if isinstance(path, RemotePath) else path


class RemoteTokens:
    """Tokens in an object store; slices of it are arrays in memory.

    Args:
        path: the file.
        dtype: of the tokens.
        cache: for blocks of it.
    """

    def __init__(self, path: RemotePath, dtype: np.dtype, cache: Cache):
        self._file, self._dtype = CachedFile(path, cache), dtype

    def __getitem__(self, span: slice) -> np.ndarray:
        tokens = np.empty(span.stop - span.start, dtype=self._dtype)
        try:
            self._file.read(span.start * self._dtype.itemsize, tokens.view(np.uint8).data)
        except (StorageError, OSError) as error:  # met by one rank alone, as all that is wrong with data
            raise DataError(str(error), exit_code_of(error)) from None
        tokens.flags.writeable = False
        return tokens


def open_tokens(path: Location, dtype: np.dtype, count: int, cache: Cache) -> "np.ndarray | RemoteTokens":
    """The tokens of a dataset, to take slices from.

    Args:
        path: the .bin.
        dtype: of the tokens.
        count: how many there are.
        cache: for a remote file.
    """
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    if isinstance(path, RemotePath):
        return RemoteTokens(path, dtype, cache)
    # a plain view: slices of a memmap cost more than the samples read through them
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
