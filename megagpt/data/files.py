"""Small files of datasets and reports, whole or absent."""

from pathlib import Path

from megagpt.errors import DataError
from megagpt.storage import local


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: the file.
        content: all of it.
        durable: wait until the disk has it; without that a crash of the machine (not of the process) may empty it.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        local.write_whole(path, content, durable)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); choose a writable folder with free space"
        ) from None
