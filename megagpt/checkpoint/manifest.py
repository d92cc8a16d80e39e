"""The manifest: what a checkpoint holds, which file holds which part, and how to tell that a file is whole.

A checkpoint is a folder `step-00000200/` with

    rank-00000.safetensors ...   per rank: the fragments of weights and moments that it owns (1-D, fp32) and its
                                 random states, as `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `rng/NAME`;
                                 each tensor with its hash, see `tensor_file.py`
    weights-00000.safetensors ...  in place of these, the weights of an imported model in the types that they came in
    probe.safetensors            `tokens` [1, S] int64, the same pseudo-random ones in every checkpoint of a model, and
                                 `logits` [1, P, vocabulary] fp32: what the training ranks, in their layout and
                                 precision, computed for the first P positions without dropout
    manifest.json                what is where, with sizes and hashes
    manifest.sha256              hash of the manifest, written last; a folder without these two does not count

It is written under a temporary name and renamed once complete; in an object store, which has no names to change, it is
there as soon as manifest.sha256 is. Beside the checkpoints, `latest` and `best` hold the
name of the newest one and of the one with the lowest validation loss. They are for people and scripts: what a run
resumes from is found by looking at all folders.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagpt.errors import CheckpointError, OtherVersionError
from megagpt.storage import Location
from megagpt.storage.local import sync_path

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
PROBE = "probe.safetensors"
FORMAT = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Record):
    """One file of the checkpoint."""

    bytes: int = Field(ge=0)
    header_xxh3: str = Field(pattern="^[0-9a-f]{32}$")
    """XXH3-128 of the header's length and text, which hold the hashes of all tensors."""


class Piece(_Record):
    """Part of one parameter in one file: elements start ... stop-1 of a flattened tensor-parallel shard."""

    file: str
    tensor_rank: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(ge=0)


class Parameter(_Record):
    """One parameter: its full shape (vocabulary not padded) and where its parts are."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    pieces: tuple[Piece, ...]


class LossScale(_Record):
    """Where fp16's dynamic loss scaling stood."""

    scale: float = Field(gt=0)
    """Factor of the loss in the next step."""
    steps: int = Field(ge=0)
    """Steps that the scaler has seen."""
    last_overflow: int = Field(ge=-1)
    """The last of those steps whose gradients overflowed; -1 if there is none."""
    hysteresis: int = Field(ge=1)
    """Overflows to come until the scale is halved."""


class Manifest(_Record):
    """Everything about a checkpoint but the tensors."""

    format: int
    megagpt: str
    versions: dict[str, str]
    step: int = Field(ge=0)
    """Steps done."""
    samples: int = Field(ge=0)
    """Training samples consumed."""
    updates: int | None = Field(default=None, ge=0)
    """Updates that the optimizer had made; None: as many as steps."""
    loss_scale: LossScale | None = None
    """Only with fp16 and a dynamic scale."""
    run: dict[str, Any]
    """The run config."""
    deepspeed: dict[str, Any]
    """The DeepSpeed config as read."""
    world_size: int = Field(ge=1)
    tensor_parallel_size: int = Field(ge=1)
    pipeline_parallel_size: int = Field(ge=1)
    padded_vocab_size: int = Field(ge=1)
    moments: tuple[str, ...]
    """Names of the optimizer's state tensors."""
    parameters: dict[str, Parameter]
    files: dict[str, File]
    metrics: dict[str, float]
    """Last known losses."""
    evaluated: bool = False
    """Whether the validation loss among them was measured at this very step."""
    save_seconds: float | None = Field(default=None, ge=0)
    """How long it took to save all but this."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Hashes of the `dataset` and of the `tokenizer` that the run had, as far as it had any."""
    precision: str
    """Type that the run computed in: fp32, bf16 or fp16."""
    probe_tolerance: float = Field(gt=0)
    """Share of the largest logit of the probe by which the same weights, computed exactly, may differ from it."""

    @property
    def updates_done(self) -> int:
        """Updates that the optimizer had made."""
        return self.step if self.updates is None else self.updates


def read_manifest(folder: Location) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: it is missing, not JSON, or names files outside the folder.
        OtherVersionError: it is of another format version.
        StorageError: the store refuses or does not answer.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        if hashlib.sha256(text).hexdigest() != (folder / MANIFEST_HASH).read_text().strip():
            raise CheckpointError(f"{path}: SHA-256 differs from {MANIFEST_HASH}'s: the content has changed")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: missing, so the checkpoint was never completed; use another one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); use another checkpoint") from None
    return parse_manifest(path, text)


def parse_manifest(path: Location, text: bytes) -> Manifest:
    """The manifest that a file's content tells of.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); use another checkpoint") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        kind = OtherVersionError if type(found) is int else CheckpointError
        raise kind(f"{path}: format={found!r}, this version reads format {FORMAT}; use a matching megagpt")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; the file is damaged, use another checkpoint") from None
    for name in manifest.files:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: files: {name!r} lies outside the checkpoint; the manifest is not ours")
    for name, parameter in manifest.parameters.items():
        for piece in parameter.pieces:
            if piece.file not in manifest.files:
                raise CheckpointError(
                    f"{path}: {name}: {piece.file!r} is not among its files; the manifest is not ours"
                )
    return manifest


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Write the manifest and, last, its hash into a checkpoint's folder, and have both on the disk."""
    text = manifest.model_dump_json(indent=1).encode()
    for name, content in ((MANIFEST, text), (MANIFEST_HASH, hashlib.sha256(text).hexdigest().encode() + b"\n")):
        path = folder / name
        path.write_bytes(content)
        if isinstance(path, Path):
            sync_path(path)
