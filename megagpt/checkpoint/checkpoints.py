"""Save a run: every rank writes what it owns, beside training; restoring is in `restore.py`."""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megagpt import __version__
from megagpt.checkpoint.background import Saved, SaveFailedError, Saves, Snapshot
from megagpt.checkpoint.changes import require_unchanged
from megagpt.checkpoint.manifest import (
    FORMAT,
    PROBE,
    File,
    LossScale,
    Manifest,
    Parameter,
    Piece,
    read_manifest,
    write_manifest,
)
from megagpt.checkpoint.reader import CheckpointReader, list_checkpoints
from megagpt.checkpoint.restore import Restorer
from megagpt.checkpoint.retention import Retention, remove
from megagpt.checkpoint.state import TrainedModel, TrainState
from megagpt.checkpoint.tensor_file import file_bytes, write_tensors
from megagpt.checkpoint.tensors_in_turn import TensorsInTurn, fragment_tensors
from megagpt.errors import CheckpointError, MegagptError, OtherVersionError, exit_code_of
from megagpt.model.initialize import full_shape
from megagpt.model.partition import partition_of
from megagpt.optim import MOMENTS
from megagpt.parallel.console import Console
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.rng import rng_state
from megagpt.plan import Plan
from megagpt.storage import Location, RemotePath, location
from megagpt.storage.local import sync_path
from megagpt.storage.steps import STEP_PREFIX

PROBE_POSITIONS = 32
"""Positions of the probe whose logits are kept: enough to tell models apart, little enough to keep for ever."""
PROBE_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Share of the largest logit, by precision. Rounding weights and activations to 16 bits moves logits by percents."""
SPARE_BYTES = 1 << 20
"""Room for the manifest and the file system's own tables."""

Pieces = dict[str, tuple[tuple[int, ...], list[Piece]]]
"""Full shape and parts of parameters by name."""


def finished_step(plan: Plan) -> int | None:
    """The step of the newest checkpoint if it is there and the run needs no more steps, else None. Sizes of files are
    checked here, hashes are not.

    Raises:
        CheckpointError: that checkpoint belongs to another model.
        StorageError: the store refuses or does not answer.
    """
    directory = plan.run.checkpoint.directory
    for folder in list_checkpoints(location(directory)) if directory else []:
        try:
            reader = CheckpointReader(folder)
        except OtherVersionError:  # restoring will tell, here and below
            return None
        except CheckpointError:
            continue
        if reader.manifest.step < plan.run.training.steps or reader.problems(with_hash=False):
            return None
        require_unchanged(reader, plan, {})
        return reader.manifest.step
    return None


def weights_will_be_replaced(plan: Plan) -> bool:
    """Whether a run starts from a checkpoint or from pretrained weights, so that it needs no initial ones.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    directory = plan.run.checkpoint.directory
    return plan.model.init_from is not None or (directory is not None and bool(list_checkpoints(location(directory))))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        plan: gives directory, retention and layout.
        engine: the model.
        ranks: this process's place; all ranks make their `Checkpoints` together.
        console: for messages.
        fingerprints: hashes of the run's `dataset` and `tokenizer`.
        on_saved: told of each complete save, by the thread that trains.
    """

    def __init__(
        self,
        plan: Plan,
        engine: TrainedModel,
        ranks: Ranks,
        console: Console,
        fingerprints: Mapping[str, str] = MappingProxyType({}),
        on_saved: Callable[[Saved], None] = lambda saved: None,
    ):
        self.plan, self.engine, self.ranks, self.console = plan, engine, ranks, console
        self.fingerprints = dict(fingerprints)
        config = plan.run.checkpoint
        self.directory = location(config.directory) if config.directory else None
        self._gated = plan.model.is_gated
        self._moments = MOMENTS[plan.run.optimizer.name]
        self._saves = Saves(ranks, lambda saved: self.on_saved(saved))
        self.on_saved = on_saved
        self._snapshot = Snapshot()
        self._retention = Retention(self.directory, config) if self.directory else None
        self.restored_save_seconds: float | None = None
        """How long the save took that was restored, if that is known."""

    # ---------------------------------------------------------------- save

    def save(self, state: TrainState, metrics: dict[str, float]) -> Location | None:
        """Save all ranks' state; collective. Nothing if the run has no checkpoint directory.

        With `checkpoint.asynchronous` it returns as soon as the state is copied; `poll` or `wait` tell of the end. A
        save that is still running is waited for first.

        Args:
            state: how far the run has come.
            metrics: last known losses, kept in the manifest.

        Returns:
            Where the checkpoint is, or will be.

        Raises:
            CheckpointError: this save (if not asynchronous) or the one before failed; earlier ones are untouched.
        """
        if self.directory is None:
            return None
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        if waited > 1:
            self.console.warn(
                f"training waited {waited:.1f} s for the save before this one: saves take longer than "
                f"checkpoint.save_interval={self.plan.run.checkpoint.save_interval} steps"
            )
        on_disk = self.engine.optimizer_is_on_disk  # memory need not have room for a copy of it
        in_thread = self.plan.run.checkpoint.asynchronous and not on_disk
        tensors, pieces = self._owned()
        if in_thread:
            tensors = self._snapshot.copy(tensors)
        probe = self._probe()
        manifest = self._manifest(state, metrics)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        final = self.directory / f"{STEP_PREFIX}{state.step:08d}"

        def work() -> None:
            try:
                self._write(final, tensors, pieces, probe, manifest, started)
            except SaveFailedError:
                temporary = temporary_folder(final)
                if self.ranks.rank == 0 and isinstance(temporary, Path):  # what is there of it takes space
                    shutil.rmtree(temporary, ignore_errors=True)  # of a remote one the next save is rid
                raise

        self._saves.start(work, final, state.step, started, in_thread)
        return final

    def poll(self) -> None:
        """Between steps: learn whether the save that is running has ended; collective while one is.

        Raises:
            CheckpointError: it failed; on all ranks at the same step.
        """
        self._saves.poll()

    def wait(self) -> None:
        """Wait for the save that is running, if there is one; collective then.

        Raises:
            CheckpointError: it failed; on all ranks.
        """
        self._saves.wait()

    def close(self) -> None:
        """Let the save that is running end before this process does, whatever ends it; talks to no other rank."""
        if problem := self._saves.close():
            self.console.warn(f"the checkpoint that was being saved is lost: {problem}")

    def _owned(self) -> tuple[dict[str, Tensor], Pieces]:
        """What this rank writes: tensors by name in the file (not copied; those on a disk are without content), and
        where they belong."""
        tensors: dict[str, Tensor] = {}
        pieces: Pieces = {}
        for fragment in self.engine.fragments():
            partition = partition_of(fragment.name, self._gated)
            if not self._owns(fragment.name, partition.dim):
                continue
            if self.engine.optimizer_is_on_disk:
                keys = ("weight", *self._moments)
                tensors |= {f"{key}/{fragment.name}": torch.empty(fragment.numel, device="meta") for key in keys}
            else:
                tensors |= fragment_tensors(fragment, self._moments)
            piece = Piece(
                file=self._file_name(), tensor_rank=self.ranks.tensor_rank, start=fragment.start, stop=fragment.stop
            )
            shape = full_shape(torch.empty(self.engine.shard_shape(fragment.name), device="meta"), partition, self.plan)
            pieces[fragment.name] = (shape, [piece])
        return tensors | {f"rng/{key}": state for key, state in rng_state().items()}, pieces

    def _file_name(self) -> str:
        return f"rank-{self.ranks.rank:05d}.safetensors"

    def _owns(self, name: str, dim: int | None) -> bool:
        """Whether this rank saves the parameter: one TP rank saves uncut ones, the first stage saves tied ones."""
        if dim is None and self.ranks.tensor_rank != 0:
            return False
        return not (name.startswith("embedding.") and not self.ranks.is_first_stage)

    def _probe(self) -> dict[str, Tensor] | None:
        """The probe's tensors on the rank that writes them; collective."""
        tokens_BS, positions = probe_tokens(self.plan), min(PROBE_POSITIONS, self.plan.seq_length)
        # No position sees a later one, so that the later ones need not be computed.
        needed = self.plan.seq_length if self.ranks.context_size > 1 else _multiple(positions, self.ranks.tensor_size)
        logits_BSV = self.engine.logits(tokens_BS[:, :needed], rows=1, positions=positions)
        if not (self.ranks.is_last_stage and self.ranks.tensor_rank == 0 and self.ranks.gradient_rank == 0):
            return None
        assert logits_BSV is not None
        return {"tokens": tokens_BS, "logits": logits_BSV.cpu()}

    # ---------------------------------------------------------------- in the thread that writes

    def _write(
        self,
        final: Location,
        tensors: dict[str, Tensor],
        pieces: Pieces,
        probe: dict[str, Tensor] | None,
        manifest: Manifest,
        started: float,
    ) -> None:
        """Write a checkpoint together with the other ranks.

        Raises:
            SaveFailedError: some rank could not; on all ranks.
        """
        temporary = temporary_folder(final)
        is_first = self.ranks.rank == 0
        needed = sum(self._saves.exchange.gather_objects(file_bytes(tensors) + file_bytes(probe or {})))
        self._together(lambda: self._prepare(temporary, needed) if is_first else None)
        files: dict[str, File] = {}

        def write_files() -> None:
            files[self._file_name()] = self._write_own(temporary / self._file_name(), tensors)
            if probe is not None:
                files[PROBE] = write_tensors(temporary / PROBE, probe)

        self._together(write_files)
        gathered = self._saves.exchange.gather_objects((files, pieces))
        whole = _joined(manifest, gathered, time.monotonic() - started)
        self._together(lambda: self._complete(temporary, final, whole) if is_first else None)

    def _write_own(self, path: Location, tensors: dict[str, Tensor]) -> File:
        if not self.engine.optimizer_is_on_disk:
            return write_tensors(path, tensors)
        with contextlib.closing(TensorsInTurn(self.engine, self._moments, tensors)) as in_turn:
            return write_tensors(path, tensors, in_turn.get)

    def _prepare(self, temporary: Location, needed: int) -> None:
        assert self._retention is not None
        if isinstance(temporary, RemotePath):
            self._retention.clean()
            remove(temporary)  # the same step again, after a resume from an older checkpoint
            return
        temporary.parent.mkdir(parents=True, exist_ok=True)
        self._retention.clean()
        free = shutil.disk_usage(temporary.parent).free
        if free < needed + SPARE_BYTES:
            raise OSError(f"{(needed + SPARE_BYTES) / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free")
        temporary.mkdir()

    def _complete(self, temporary: Location, final: Location, manifest: Manifest) -> None:
        assert self._retention is not None
        write_manifest(temporary, manifest)
        if isinstance(temporary, Path) and isinstance(final, Path):
            sync_path(temporary)
            self._retention.replace(temporary, final)
        read_manifest(final)  # what cannot be read again must not replace what can
        self._retention.apply()

    def _together(self, action: Callable[[], Any]) -> None:
        """Do something on each rank and fail on all ranks if one has failed, so that none waits for it."""
        problem, exit_code = None, CheckpointError.exit_code
        try:
            action()
        except (FileNotFoundError, FileExistsError) as error:  # what another rank made is gone, or is not seen here
            problem = f"rank {self.ranks.rank}: {error}: do all hosts see it, and does no other run save there?"
        except (OSError, MegagptError) as error:
            problem, exit_code = f"rank {self.ranks.rank}: {error}", exit_code_of(error)
        except Exception as error:  # a bug here must not leave the other ranks waiting
            problem = f"rank {self.ranks.rank}: {type(error).__name__}: {error}"
        gathered = self._saves.exchange.gather_objects((problem, exit_code))
        if problems := {problem: exit_code for problem, exit_code in gathered if problem}:
            raise SaveFailedError("; ".join(problems), min(problems.values()))  # what is to be mended comes first

    def _manifest(self, state: TrainState, metrics: dict[str, float]) -> Manifest:
        """The manifest without what the other ranks write."""
        loss_scale = self.engine.loss_scale_state()
        return Manifest(
            format=FORMAT,
            megagpt=__version__,
            versions={name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
            step=state.step,
            samples=state.samples,
            updates=state.updates,
            loss_scale=LossScale.model_validate(loss_scale) if loss_scale else None,
            run=self.plan.run.model_dump(mode="json"),
            deepspeed=dict(self.plan.deepspeed.raw),
            world_size=self.plan.world_size,
            tensor_parallel_size=self.plan.tensor_parallel_size,
            pipeline_parallel_size=self.plan.pipeline_parallel_size,
            padded_vocab_size=self.plan.padded_vocab_size,
            moments=self._moments,
            parameters={},
            files={},
            metrics=dict(metrics),
            evaluated=state.evaluated,
            fingerprints=self.fingerprints,
            precision=self.plan.precision,
            probe_tolerance=PROBE_TOLERANCE[self.plan.precision],
        )

    # ---------------------------------------------------------------- restore

    def restore_latest(self) -> TrainState | None:
        """Load the newest intact checkpoint into the engine; collective. None if there is none.

        Raises:
            CheckpointError: it belongs to another model, or there are checkpoints but none is intact.
            StorageError: the store refuses or does not answer; on all ranks.
        """
        if self.directory is None:
            return None
        restorer = Restorer(self.plan, self.engine, self.ranks, self.console, self.fingerprints)
        reader = restorer.restore_newest(self.directory)
        if reader is None:
            return None
        manifest = reader.manifest
        self.restored_save_seconds = manifest.save_seconds
        updates = manifest.updates_done if restorer.has_moments(reader) else 0
        return TrainState(manifest.step, manifest.samples, updates, manifest.evaluated)


def temporary_folder(final: Location) -> Location:
    """Where a checkpoint is written before it is complete."""
    if isinstance(final, RemotePath):  # which has no names to change: it is complete once its last object is there
        return final
    return final.with_name(f".{final.name}.tmp")


def _joined(manifest: Manifest, gathered: list[tuple[dict[str, File], Pieces]], seconds: float) -> Manifest:
    """The manifest with the files and pieces of all ranks, and how long they took."""
    files: dict[str, File] = {}
    parts: Pieces = {}
    for rank_files, rank_pieces in gathered:
        files.update(rank_files)
        for name, (shape, pieces) in rank_pieces.items():
            parts.setdefault(name, (shape, []))[1].extend(pieces)
    parameters = {name: Parameter(shape=shape, pieces=tuple(pieces)) for name, (shape, pieces) in parts.items()}
    return manifest.model_copy(update={"files": files, "parameters": parameters, "save_seconds": seconds})


def probe_tokens(plan: Plan) -> Tensor:
    """One fixed sample of token ids, [1, sequence length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, plan.model.vocab_size, (1, plan.seq_length), generator=generator)


def _multiple(number: int, of: int) -> int:
    """The smallest multiple that is not smaller."""
    return -(-number // of) * of
