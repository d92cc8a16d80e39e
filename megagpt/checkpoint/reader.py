"""Read a checkpoint: the whole of a parameter or one tensor-parallel rank's shard of it, whatever layout wrote it."""

from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint.manifest import PROBE, Manifest, file_problem, read_manifest
from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.partition import partition_of
from megagpt.plan import RunConfig, run_config_from_dict

STEP_PREFIX = "step-"


def list_checkpoints(directory: Path) -> list[Path]:
    """Folders of complete-looking checkpoints under a run's checkpoint directory, newest first."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if path.name.startswith(STEP_PREFIX) and path.is_dir()]
    return sorted((path for path in folders if path.name[len(STEP_PREFIX) :].isdigit()), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder from what a user gives: the folder itself, or a run's directory (its newest one).

    Raises:
        CheckpointError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"{path}: no checkpoint here; give a folder with manifest.json, or one with {STEP_PREFIX}N folders"
        )
    return checkpoints[0]


class CheckpointReader:
    """One checkpoint on disk.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        try:
            self.run: RunConfig = run_config_from_dict(self.manifest.run, source=f"{folder}/manifest.json")
            """The run that wrote it."""
        except ConfigError as error:
            raise CheckpointError(f"{error}; another version of megagpt may read this checkpoint") from None
        self._gated = self.run.model.is_gated

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters."""
        return list(self.manifest.parameters)

    def problems(self, part: int = 0, of: int = 1, with_hash: bool = True) -> list[str]:
        """Missing, truncated or changed files; empty if all is well.

        Args:
            part: look at every `of`-th file from this one on, so that ranks can share the work.
            of: number of parts.
            with_hash: read the files and compare their hashes; else look at sizes only.
        """
        files = sorted(self.manifest.files.items())[part::of]
        found = (file_problem(self.folder / name, expected, with_hash) for name, expected in files)
        return [problem for problem in found if problem]

    def full(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter (or moment, by `kind`) in fp32, vocabulary not padded.

        Raises:
            CheckpointError: the parameter or one of its files is not there, or its parts leave a gap.
        """
        partition = partition_of(name, self._gated)
        count = 1 if partition.dim is None else self.manifest.tensor_parallel_size
        shards = [self._stored_shard(name, kind, rank) for rank in range(count)]
        return partition.join(shards, self.run.model.vocab_size)

    def shard(self, name: str, kind: str, tensor_rank: int, tensor_size: int, padded_vocab_size: int) -> Tensor:
        """One rank's tensor-parallel shard in fp32, for any tensor-parallel size.

        Raises:
            CheckpointError: as for `full`.
        """
        manifest, partition = self.manifest, partition_of(name, self._gated)
        if (tensor_size, padded_vocab_size) == (manifest.tensor_parallel_size, manifest.padded_vocab_size):
            return self._stored_shard(name, kind, 0 if partition.dim is None else tensor_rank)
        return partition.shard(self.full(name, kind), tensor_rank, tensor_size, padded_vocab_size)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random states of one rank."""
        prefix = "rng/"
        with self._open(f"rank-{rank:05d}.safetensors") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}

    def probe(self) -> tuple[Tensor, Tensor]:
        """The probe: tokens [1, S] and the trained model's logits [1, P, vocabulary] at the first P positions.

        The logits were computed in `manifest.precision`; the same weights computed exactly may differ from them by
        `manifest.probe_tolerance` times the largest logit.
        """
        with self._open(PROBE) as file:
            return file.get_tensor("tokens"), file.get_tensor("logits")

    def _shard_shape(self, name: str) -> tuple[int, ...]:
        partition = partition_of(name, self._gated)
        shape = list(self.manifest.parameters[name].shape)
        if partition.vocabulary:
            shape[0] = self.manifest.padded_vocab_size
        if partition.dim is not None:
            shape[partition.dim] //= self.manifest.tensor_parallel_size
        return tuple(shape)

    def _stored_shard(self, name: str, kind: str, tensor_rank: int) -> Tensor:
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder}: has no parameter {name}; it belongs to another model")
        shape = self._shard_shape(name)
        flat = torch.empty(prod(shape))
        covered = 0
        pieces = [piece for piece in self.manifest.parameters[name].pieces if piece.tensor_rank == tensor_rank]
        for piece in sorted(pieces, key=lambda piece: piece.start):
            where = f"{self.folder}/{piece.file}: {kind}/{name}"
            with self._open(piece.file) as file:
                try:
                    part = file.get_tensor(f"{kind}/{name}")
                except SafetensorError:
                    raise CheckpointError(f"{where} is missing; the file is not ours") from None
            if part.numel() != piece.stop - piece.start or piece.stop > flat.numel() or piece.start != covered:
                raise CheckpointError(
                    f"{where} has {part.numel()} elements, not {piece.start} to {piece.stop} after the {covered} before"
                )
            flat[piece.start : piece.stop] = part
            covered = piece.stop
        if covered != flat.numel():
            raise CheckpointError(
                f"{self.folder}: {covered} of {flat.numel()} elements of {kind}/{name} are here; use another checkpoint"
            )
        return flat.reshape(shape)

    def _open(self, name: str):
        path = self.folder / name
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); use another checkpoint") from None
