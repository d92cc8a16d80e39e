"""Read a checkpoint: the whole of a parameter or one tensor-parallel rank's shard of it, whatever layout wrote it."""

import threading
from math import prod
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.manifest import MANIFEST, MANIFEST_HASH, PROBE, Manifest, Parameter, Piece, read_manifest
from megagpt.checkpoint.tensor_file import DamagedError, TensorFile
from megagpt.errors import CheckpointError, ConfigError, OtherVersionError
from megagpt.host_tensors import host_memory
from megagpt.model.partition import partition_of
from megagpt.plan import RunConfig, run_config_from_dict
from megagpt.storage import Location, RemotePath
from megagpt.storage.steps import STEP_PREFIX, step_folders


def list_checkpoints(directory: Location) -> list[Location]:
    """Folders of complete-looking checkpoints under a run's checkpoint directory, newest first.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    if isinstance(directory, RemotePath):
        return [folder for folder in step_folders(directory) if (folder / MANIFEST_HASH).is_file()]
    return [folder for folder in step_folders(directory) if folder.is_dir()] if directory.is_dir() else []


def find_checkpoint(path: Location) -> Location:
    """A checkpoint folder from what a user gives: the folder itself, or a run's directory (its newest one).

    Raises:
        CheckpointError: there is none.
        StorageError: the store refuses or does not answer.
    """
    if (path / MANIFEST).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"{path}: no checkpoint here; give a folder with manifest.json, or one with {STEP_PREFIX}N folders"
        )
    return checkpoints[0]


class CheckpointReader:
    """One checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: the manifest is missing or damaged.
        OtherVersionError: it is whole, but this version cannot read it.
        StorageError: here as in all methods: the store refuses or does not answer.
    """

    def __init__(self, folder: Location):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        try:
            self.run: RunConfig = run_config_from_dict(self.manifest.run, source=f"{folder}/manifest.json")
            """The run that wrote it."""
        except ConfigError as error:
            raise OtherVersionError(f"{error}; another version of megagpt may read this checkpoint") from None
        self._gated = self.run.model.is_gated
        for name, parameter in self.manifest.parameters.items():
            self._require_known(name, len(parameter.shape))
        self._files: dict[str, TensorFile] = {}
        self._scratch = threading.local()
        self._opening = threading.Lock()

    def _require_known(self, name: str, dimensions: int) -> None:
        try:
            partition = partition_of(name, self._gated)
        except AssertionError:
            raise CheckpointError(f"{self.folder}: {name} is no parameter of ours; the manifest is not ours") from None
        if dimensions <= (partition.dim or 0):
            raise CheckpointError(f"{self.folder}: {name} has {dimensions} dimensions; the manifest is not ours")

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters."""
        return list(self.manifest.parameters)

    def problems(self, part: int = 0, of: int = 1, with_hash: bool = True) -> list[str]:
        """Missing, truncated or changed files; empty if all is well.

        Args:
            part: look at every `of`-th file from this one on, so that ranks can share the work.
            of: number of parts.
            with_hash: read the files and compare their hashes; else look at sizes and headers only.
        """
        names = sorted(self.manifest.files)[part::of]
        return [problem for name in names if (problem := self.file_problem(name, with_hash))]

    def file_problem(self, name: str, with_hash: bool = True) -> str | None:
        """What is wrong with one file, as a sentence; None if it is whole."""
        try:
            file = self._file(name)
            if with_hash:
                file.verify_rest()
        except DamagedError as error:
            return str(error)
        return None

    def verified_files(self) -> list[str]:
        """Files of which all has been read, and found to be what was saved."""
        return [name for name, file in self._files.items() if file.is_verified]

    def full(self, name: str, kind: str = "weight", out: Tensor | None = None) -> Tensor:
        """A whole parameter (or moment, by `kind`), vocabulary not padded.

        Args:
            out: contiguous tensor of its shape and any type to read into; default: a new one in fp32.

        Raises:
            CheckpointError: the parameter or one of its files is not there or damaged, or its parts leave a gap.
        """
        self._require_stored(name, kind)
        partition, size = partition_of(name, self._gated), self.manifest.tensor_parallel_size
        shape = self._whole_shape(name)
        if partition.dim is None or (size == 1 and self._shard_shape(name) == shape):
            return self._stored_shard(name, kind, 0, out=out)
        whole = torch.empty(shape) if out is None else out
        for rank in range(size):
            shard = self._stored_shard(name, kind, rank, out=self._memory(0, self._shard_shape(name)))
            begin = 0
            for place in partition.views(whole, rank, size, self.manifest.padded_vocab_size):
                count = place.shape[partition.dim]
                place.copy_(shard.narrow(partition.dim, begin, count))
                begin += count
        return whole

    def stored(self, name: str) -> Tensor:
        """A whole parameter in the type that it is stored in, in memory that the next such call overwrites.

        Raises:
            CheckpointError: as for `full`.
        """
        self._require_stored(name)
        return self.full(name, out=self._memory(2, self._whole_shape(name), self.dtype(name)))

    def stored_rows(self, name: str, first: int, last: int) -> Tensor:
        """`vocabulary_rows` in the type that they are stored in, in memory that the next such call overwrites.

        Raises:
            CheckpointError: as for `full`.
        """
        self._require_stored(name)
        shape = (last - first, *self._parameter(name).shape[1:])
        return self.vocabulary_rows(name, first, last, self._memory(2, shape, self.dtype(name)))

    def dtype(self, name: str) -> torch.dtype:
        """The type that a parameter's weights are stored in: that of the model which was imported, else fp32.

        Raises:
            CheckpointError: as for `full`.
        """
        dtypes = set()
        for piece in self._parameter(name).pieces:
            entry = self._file(piece.file).entries.get(f"weight/{name}")
            dtypes.add(torch.float32 if entry is None else entry.dtype)
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def shard(
        self,
        name: str,
        kind: str,
        tensor_rank: int,
        tensor_size: int,
        padded_vocab_size: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """One rank's tensor-parallel shard, for any tensor-parallel size.

        Args:
            out: contiguous tensor of its shape and any type to read into; default: a new one in fp32.

        Raises:
            CheckpointError: as for `full`.
        """
        partition = partition_of(name, self._gated)
        if self._is_stored_so(tensor_size, padded_vocab_size):
            return self._stored_shard(name, kind, 0 if partition.dim is None else tensor_rank, out=out)
        shard = partition.shard(self.full(name, kind), tensor_rank, tensor_size, padded_vocab_size)
        return shard if out is None else out.copy_(shard)

    def part_of_shard(
        self,
        name: str,
        kind: str,
        tensor_rank: int,
        tensor_size: int,
        padded_vocab_size: int,
        start: int,
        out: Tensor,
    ) -> None:
        """Elements of a flattened `shard`; no more is read than has to be.

        Args:
            start: the first of them.
            out: contiguous 1-D tensor of any type to read into.

        Raises:
            CheckpointError: as for `full`.
        """
        stop = start + out.numel()
        if not self._is_stored_so(tensor_size, padded_vocab_size):
            out.copy_(self.shard(name, kind, tensor_rank, tensor_size, padded_vocab_size).flatten()[start:stop])
            return
        stored_rank = 0 if partition_of(name, self._gated).dim is None else tensor_rank
        self._stored_shard(name, kind, stored_rank, (start, stop), out)

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for one fp32 tensor, which the next call of this thread gives again."""
        return self._memory(3, shape)

    def shard_shape(self, name: str, tensor_size: int, padded_vocab_size: int) -> tuple[int, ...]:
        """The shape of a `shard`.

        Raises:
            CheckpointError: there is no such parameter.
        """
        partition = partition_of(name, self._gated)
        shape = list(self._parameter(name).shape)
        if partition.vocabulary:
            shape[0] = padded_vocab_size
        if partition.dim is not None:
            shape[partition.dim] //= tensor_size
        return tuple(shape)

    def vocabulary_rows(self, name: str, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Rows of an embedding or head; memory holds no more than them.

        Args:
            name: canonical name of a parameter whose rows are tokens.
            first: first token.
            last: one past the last token; at most the vocabulary's size.
            out: contiguous tensor of any type to read into; default: a new one in fp32.

        Raises:
            CheckpointError: as for `full`.
        """
        self._require_stored(name)
        share, width = self._shard_shape(name)
        rows, done = torch.empty(last - first, width) if out is None else out, 0
        flat = rows.view(-1)
        for rank in range(first // share, -(-last // share)):
            begin, end = max(first - rank * share, 0) * width, min(last - rank * share, share) * width
            for piece in self._pieces(name, rank):
                start, stop = max(begin, piece.start), min(end, piece.stop)
                if start < stop:
                    part = flat[done : done + stop - start]
                    self._file(piece.file).read_part(f"weight/{name}", start - piece.start, part)
                    done += stop - start
        return rows

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random states of one rank."""
        prefix = "rng/"
        file = self._file(f"rank-{rank:05d}.safetensors")
        return {name.removeprefix(prefix): file.read(name) for name in file.entries if name.startswith(prefix)}

    def probe(self) -> tuple[Tensor, Tensor]:
        """The probe: tokens [1, S] and the trained model's logits [1, P, vocabulary] at the first P positions.

        The logits were computed in `manifest.precision`; the same weights computed exactly may differ from them by
        `manifest.probe_tolerance` times the largest logit.
        """
        file = self._file(PROBE)
        return file.read("tokens"), file.read("logits")

    def _is_stored_so(self, tensor_size: int, padded_vocab_size: int) -> bool:
        manifest = self.manifest
        return (tensor_size, padded_vocab_size) == (manifest.tensor_parallel_size, manifest.padded_vocab_size)

    def _shard_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a shard as it is stored."""
        return self.shard_shape(name, self.manifest.tensor_parallel_size, self.manifest.padded_vocab_size)

    def _parameter(self, name: str) -> Parameter:
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder}: has no parameter {name}; it belongs to another model")
        return self.manifest.parameters[name]

    def _stored_shard(
        self,
        name: str,
        kind: str,
        tensor_rank: int,
        span: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A shard as it was saved, or the elements of a span of it, 1-D; in `out`, of any type, or else new in fp32."""
        pieces, shape, entry = self._pieces(name, tensor_rank), self._shard_shape(name), f"{kind}/{name}"
        self._require_whole(pieces, prod(shape), entry)
        start, stop = span or (0, prod(shape))
        wanted = torch.empty(shape if span is None else stop - start) if out is None else out
        flat = wanted.view(-1)
        for piece in pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first >= last:
                continue
            place = flat[first - start : last - start]
            if (first, last) == (piece.start, piece.stop):
                self._file(piece.file).read(entry, place)
            else:  # all of it is read, to compare its hash
                whole = self._memory(1, (piece.stop - piece.start,))
                self._file(piece.file).read(entry, whole)
                place.copy_(whole[first - piece.start : last - piece.start])
        return wanted

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, vocabulary not padded."""
        shape = self._parameter(name).shape
        if partition_of(name, self._gated).vocabulary:
            return (self.run.model.vocab_size, *shape[1:])
        return shape

    def _pieces(self, name: str, tensor_rank: int) -> list[Piece]:
        pieces = [piece for piece in self._parameter(name).pieces if piece.tensor_rank == tensor_rank]
        return sorted(pieces, key=lambda piece: piece.start)

    def _require_stored(self, name: str, kind: str = "weight") -> None:
        """See that the files have a whole parameter, and that it is cut as we cut it, before any memory is taken."""
        shape, size = list(self._whole_shape(name)), self.manifest.tensor_parallel_size
        partition, padded = partition_of(name, self._gated), self.manifest.padded_vocab_size
        if partition.vocabulary and shape[0] <= padded:
            shape[0] = padded
        if partition.dim is None:
            size = 1
        elif shape[partition.dim] % (size << partition.gated) or (partition.vocabulary and shape[0] > padded):
            raise CheckpointError(
                f"{self.folder}: {name}, {shape}, cannot have been cut by tensor_parallel_size={size}; the "
                "manifest is not ours"
            )
        for rank in range(size):
            self._require_whole(self._pieces(name, rank), prod(self._shard_shape(name)), f"{kind}/{name}")

    def _require_whole(self, pieces: list[Piece], numel: int, entry: str) -> None:
        """See that pieces in order make up a shard, and that their files have them, before any memory is taken."""
        covered = 0
        for piece in pieces:
            file = self._file(piece.file)
            found = file.entries.get(entry)
            if found is None or not found.dtype.is_floating_point or prod(found.shape) != piece.stop - piece.start:
                what = "is missing" if found is None else f"is {found.dtype}, {list(found.shape)}"
                raise DamagedError(
                    f"{file.path}: {entry} {what}, not {piece.stop - piece.start} floating-point elements; the file is "
                    "not ours"
                )
            if piece.stop > numel or piece.start != covered:
                raise CheckpointError(
                    f"{file.path}: {entry} is said to hold elements {piece.start} to {piece.stop} of {numel}, after "
                    f"the {covered} before; the manifest is not ours"
                )
            covered = piece.stop
        if covered != numel:
            raise CheckpointError(
                f"{self.folder}: {covered} of {numel} elements of {entry} are here; use another checkpoint"
            )

    def _memory(self, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of this thread that is used again and again: fresh memory costs more than reading into it."""
        scratch: dict[Any, Tensor] = self._scratch.__dict__
        size = prod(shape) * dtype.itemsize
        if index not in scratch or scratch[index].numel() < size:
            scratch[index] = host_memory(size)
        return scratch[index][:size].view(dtype).view(shape)

    def _file(self, name: str) -> TensorFile:
        with self._opening:
            if name not in self._files:
                if name not in self.manifest.files:
                    raise DamagedError(f"{self.folder}: has no {name}; it is not ours")
                self._files[name] = TensorFile(self.folder / name, self.manifest.files[name])
            return self._files[name]
