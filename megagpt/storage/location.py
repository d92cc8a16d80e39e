"""Paths: local ones are `pathlib.Path`, those in an object store `RemotePath`."""

import posixpath
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import StorageError
from megagpt.storage.filesystem import call, filesystem


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder in an object store, as far as possible like a `pathlib.Path`.

    Each method raises StorageError if the store refuses, is not there or does not answer in bounded time, and
    FileNotFoundError where a `Path` does. A folder is there as long as there are files in it.
    """

    url: str
    """Such as s3://bucket/folder, without a slash at the end."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.url)

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in."""
        return RemotePath(posixpath.dirname(self.url))

    def with_name(self, name: str) -> "RemotePath":
        """Another file or folder of the same folder."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is a file, or a folder that holds any."""
        return bool(call(self.url, "exists", self.url))

    def is_file(self) -> bool:
        """Whether there is a file of this very name."""
        return bool(call(self.url, "isfile", self.url))

    def is_dir(self) -> bool:
        """Whether there are files in it."""
        return bool(call(self.url, "isdir", self.url))

    def iterdir(self) -> "Iterator[RemotePath]":
        """Files and folders in it; none if it is not there."""
        try:
            found = call(self.url, "ls", self.url, detail=False)
        except FileNotFoundError:
            return
        inside = self.url.partition("://")[2]
        for path in found:
            folder, name = posixpath.split(str(path).strip("/"))
            if folder == inside:  # else it is the folder itself, or a file of its name
                yield self / name

    def size(self) -> int:
        """Bytes of a file."""
        return int(call(self.url, "info", self.url)["size"])

    def version(self) -> str:
        """What changes when a file is replaced, as far as the store tells."""
        told = call(self.url, "info", self.url)
        names = ("size", "ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created")
        return repr([(name, str(told[name])) for name in names if told.get(name) is not None])

    def read_bytes(self) -> bytes:
        """All of a file."""
        return bytes(call(self.url, "cat_file", self.url))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """All of a file, decoded."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        """Write or replace a small file; whoever reads it sees the old content or the new one."""
        call(self.url, "pipe_file", self.url, content)

    def touch(self) -> None:
        """Make an empty file, or empty one that is there."""
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            call(self.url, "rm_file", self.url)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove a folder with all that is in it; nothing if it is not there."""
        try:
            call(self.url, "rm", self.url, recursive=True)
        except FileNotFoundError:
            return

    def move_to(self, other: "RemotePath") -> None:
        """Give a folder of files another name within the store: they are copied there, none passes through this host,
        and removed here once all are."""
        files = [path.name for path in self.iterdir()]
        for name in files:
            call(self.url, "cp_file", f"{self.url}/{name}", f"{other.url}/{name}")
        self.remove_tree()

    def require_writable(self) -> None:
        """See that files can be written to, read from and removed from this folder.

        Raises:
            StorageError: they cannot.
        """
        probe = self / f".probe-{secrets.token_hex(4)}"
        probe.write_bytes(b"may be removed\n")
        probe.read_bytes()
        probe.unlink()

    def abandon_uploads(self) -> None:
        """Have the store forget parts of files that killed processes have left under this folder (S3 keeps them)."""
        store = filesystem(self.url)
        if not hasattr(store, "abort_mpu"):
            return
        bucket, key, _ = store.split_path(self.url)
        found = call(self.url, "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        for upload in found.get("Uploads") or []:
            call(self.url, "abort_mpu", bucket, upload["Key"], upload["UploadId"])


Location = Path | RemotePath
"""A file or folder, wherever it is."""


def location(text: str | Path | RemotePath) -> Location:
    """The file or folder that a user means: with `PROTOCOL://` in front it is in an object store, else it is local."""
    if not isinstance(text, str):
        return text
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if protocol in ("file", "local"):
        return Path(rest)
    return RemotePath(f"{protocol}://{rest.rstrip('/')}")


def local_folder(text: str) -> Path:
    """The local folder that a user means, where no other will do.

    Raises:
        StorageError: it is in an object store.
    """
    found = location(text)
    if isinstance(found, RemotePath):
        raise StorageError(f"{text} is in an object store, which this cannot use; give a local folder")
    return found


def rename(folder: Location, name: str) -> None:
    """Give a folder of files another name; in an object store that copies them, and what is killed leaves both.

    Raises:
        OSError: it cannot be done.
        StorageError: the store refuses or does not answer.
    """
    if isinstance(folder, RemotePath):
        folder.move_to(folder.with_name(name))
    else:
        folder.rename(folder.with_name(name))
