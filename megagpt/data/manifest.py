"""PREFIX.json: what a dataset was made from. Written last, so that a dataset with a manifest is complete."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

from megagpt.data.files import write_whole
from megagpt.data.opening import dataset_file, local_file
from megagpt.errors import DataError, exit_code_of
from megagpt.storage import Location
from megagpt.storage.transfer import sha256_of

FORMAT = 2


@dataclass(frozen=True)
class InputFile:
    """One text file that went into a dataset."""

    path: str
    bytes: int
    modified_ns: int
    """When it was last changed: nanoseconds since 1970."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Origin and content of a dataset."""

    format: int
    megagpt_version: str
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    """Token type on disk, as numpy names it."""
    text_key: str
    append_eod: bool
    min_length: int
    """Fewest characters of a document."""
    seed: int | None
    """Seed of the order of documents; None: as in the inputs."""
    on_bad_line: str
    num_documents: int
    num_tokens: int
    skipped_short: int
    """Documents of fewer characters than `min_length`."""
    skipped_bad: int
    """Lines (rows, files) that were no documents."""
    bin_sha256: str
    idx_sha256: str
    inputs: tuple[InputFile, ...]
    special_tokens_in_text: bool = False
    """Whether special tokens that the texts spell out were taken for themselves; files of earlier versions lack it."""

    def require_fits(self, prefix: str | Path, num_documents: int, num_tokens: int) -> None:
        """See that the files hold as much as the manifest says.

        Raises:
            DataError: they do not.
        """
        if (self.num_documents, self.num_tokens) != (num_documents, num_tokens):
            raise DataError(
                f"{manifest_path(prefix)} describes {self.num_documents} documents with {self.num_tokens} tokens, but "
                f".bin/.idx hold {num_documents} with {num_tokens}; rebuild with tools/preprocess_data.py"
            )


def manifest_path(prefix: str | Path) -> Location:
    """Path of the manifest that belongs to a prefix."""
    return dataset_file(prefix, ".json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write PREFIX.json.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(local_file(prefix, ".json"), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read PREFIX.json; None if there is none (files that Megatron wrote have none).

    Raises:
        DataError: the file is damaged or of an unknown format.
        StorageError: the store refuses or does not answer.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable manifest ({error}); rebuild with tools/preprocess_data.py", exit_code_of(error)
        ) from None
    names = {field.name for field in fields(Manifest)}
    if isinstance(content, dict):
        content.setdefault("special_tokens_in_text", False)
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != names:
        raise DataError(f"{path} is not a manifest of format {FORMAT}; rebuild with tools/preprocess_data.py")
    try:
        content["inputs"] = tuple(InputFile(**entry) for entry in content["inputs"])
    except TypeError:
        raise DataError(f"{path} has damaged `inputs`; rebuild with tools/preprocess_data.py") from None
    manifest = Manifest(**content)
    records: list[Manifest | InputFile] = [manifest, *manifest.inputs]
    for record in records:
        for entry in fields(record):
            # bool is an int to isinstance
            value = getattr(record, entry.name)
            if entry.name != "inputs" and type(value) not in (get_args(entry.type) or (entry.type,)):
                raise DataError(f"{path}: {entry.name} is {value!r}; rebuild with tools/preprocess_data.py")
    return manifest


def verify_files(prefix: str | Path) -> Manifest:
    """Compare the hashes of .bin and .idx with the manifest; reads both files in full.

    Raises:
        DataError: there is no manifest, a file is missing or differs.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{manifest_path(prefix)} does not exist; only datasets of tools/preprocess_data.py have one")
    for suffix, expected in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        path = dataset_file(prefix, suffix)
        try:
            found = sha256_of(path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); rebuild with tools/preprocess_data.py", exit_code_of(error)
            ) from None
        if found != expected:
            raise DataError(
                f"{path} has sha256 {found}, its manifest says {expected}; the file was damaged or replaced:"
                " rebuild with tools/preprocess_data.py"
            )
    return manifest
