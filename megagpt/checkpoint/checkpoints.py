"""Save and restore a run: every rank writes what it owns, every layout reads what it needs."""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megagpt import __version__
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
    sha256_of,
    sync_path,
    write_manifest,
)
from megagpt.checkpoint.reader import STEP_PREFIX, CheckpointReader, list_checkpoints
from megagpt.errors import CheckpointError
from megagpt.model.initialize import full_shape
from megagpt.model.partition import partition_of
from megagpt.optim import MOMENTS
from megagpt.parallel.console import Console
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.rng import rng_state, set_rng_state
from megagpt.plan import Plan

_UMASK = os.umask(0o022)
os.umask(_UMASK)

PROBE_POSITIONS = 32
"""Positions of the probe whose logits are kept: enough to tell models apart, little enough to keep for ever."""

PROBE_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Share of the largest logit, by precision. Rounding weights and activations to 16 bits moves logits by percents."""


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    """Steps done: global batches consumed."""
    samples: int = 0
    """Training samples consumed."""
    updates: int = 0
    """Updates that the optimizer has made: steps that fp16 did not skip, since the optimizer last started afresh."""

    def advance(self, samples: int, skipped: bool = False) -> "TrainState":
        """The state after one more step on `samples` samples."""
        return TrainState(self.step + 1, self.samples + samples, self.updates + (not skipped))


def finished_step(plan: Plan) -> int | None:
    """The step of the newest checkpoint if it is there and the run needs no more steps, else None. Sizes of files are
    checked here, hashes are not.

    Raises:
        CheckpointError: that checkpoint belongs to another model.
    """
    directory = plan.run.checkpoint.directory
    for folder in list_checkpoints(Path(directory)) if directory else []:
        try:
            reader = CheckpointReader(folder)
        except CheckpointError:  # restoring will tell
            continue
        if reader.manifest.step < plan.run.training.steps or reader.problems(with_hash=False):
            return None
        require_unchanged(reader, plan, {})
        return reader.manifest.step
    return None


class TrainedModel(Protocol):
    """What checkpoints need of an engine."""

    parameters: dict[str, Any]

    def fragments(self) -> list[Any]: ...
    def load_weight(self, name: str, shard: Tensor) -> None: ...
    def shard_shape(self, name: str) -> tuple[int, ...]: ...
    def logits(self, tokens_BS: Tensor, rows: int, positions: int) -> Tensor | None: ...
    def loss_scale_state(self) -> dict[str, float] | None: ...
    def set_loss_scale_state(self, state: dict[str, float]) -> None: ...


class Checkpoints:
    """The checkpoints of one run.

    Args:
        plan: gives directory, retention and layout.
        engine: the model.
        ranks: this process's place.
        console: for messages.
        fingerprints: hashes of the run's `dataset` and `tokenizer`.
    """

    def __init__(
        self,
        plan: Plan,
        engine: TrainedModel,
        ranks: Ranks,
        console: Console,
        fingerprints: Mapping[str, str] = MappingProxyType({}),
    ):
        self.plan, self.engine, self.ranks, self.console = plan, engine, ranks, console
        self.fingerprints = dict(fingerprints)
        folder = plan.run.checkpoint.directory
        self.directory = Path(folder) if folder else None
        self._gated = plan.model.is_gated
        self._moments = MOMENTS[plan.run.optimizer.name]

    # ---------------------------------------------------------------- save

    def save(self, state: TrainState, metrics: dict[str, float]) -> Path | None:
        """Write a checkpoint of all ranks; collective. Nothing if the run has no checkpoint directory.

        Args:
            state: how far the run has come.
            metrics: last known losses, kept in the manifest.

        Raises:
            CheckpointError: a rank could not write; the earlier checkpoints are untouched.
        """
        if self.directory is None:
            return None
        final = self.directory / f"{STEP_PREFIX}{state.step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        problem = self._attempt(lambda: self._prepare(temporary) if self.ranks.rank == 0 else None)
        self._raise_together(problem, final)
        files: dict[str, File] = {}
        pieces: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        problem = self._attempt(lambda: self._write_rank(temporary, files, pieces))
        self._raise_together(problem, final)
        self._write_probe(temporary, files, final)
        gathered = self.ranks.gather_objects((files, pieces))
        problem = None
        if self.ranks.rank == 0:
            problem = self._attempt(lambda: self._complete(temporary, final, self._manifest(state, metrics, gathered)))
        self._raise_together(problem, final)
        return final

    def _prepare(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while saving
        temporary.mkdir(parents=True)

    def _write_rank(self, temporary: Path, files: dict[str, File], pieces: dict) -> None:
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        tensors = {f"rng/{key}": state for key, state in rng_state().items()}
        for fragment in self.engine.fragments():
            partition = partition_of(fragment.name, self._gated)
            if not self._owns(fragment.name, partition.dim):
                continue
            tensors[f"weight/{fragment.name}"] = fragment.master
            for key in self._moments:
                tensors[f"{key}/{fragment.name}"] = fragment.moment(key)
            piece = Piece(file=name, tensor_rank=self.ranks.tensor_rank, start=fragment.start, stop=fragment.stop)
            shape = full_shape(torch.empty(self.engine.shard_shape(fragment.name), device="meta"), partition, self.plan)
            pieces[fragment.name] = (shape, [piece])
        files[name] = _write(temporary / name, tensors)

    def _owns(self, name: str, dim: int | None) -> bool:
        """Whether this rank saves the parameter: one TP rank saves uncut ones, the first stage saves tied ones."""
        if dim is None and self.ranks.tensor_rank != 0:
            return False
        return not (name.startswith("embedding.") and not self.ranks.is_first_stage)

    def _write_probe(self, temporary: Path, files: dict[str, File], final: Path) -> None:
        tokens_BS = probe_tokens(self.plan)
        logits_BSV = self.engine.logits(tokens_BS, rows=1, positions=min(PROBE_POSITIONS, tokens_BS.shape[1]))
        writer = self.ranks.is_last_stage and self.ranks.tensor_rank == 0 and self.ranks.gradient_rank == 0

        def write() -> None:
            assert logits_BSV is not None
            tensors = {"tokens": tokens_BS[:1], "logits": logits_BSV}
            files[PROBE] = _write(temporary / PROBE, tensors)

        self._raise_together(self._attempt(write) if writer else None, final)

    def _manifest(self, state: TrainState, metrics: dict[str, float], gathered: list) -> Manifest:
        files: dict[str, File] = {}
        parameters: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        for rank_files, rank_pieces in gathered:
            files.update(rank_files)
            for name, (shape, parts) in rank_pieces.items():
                parameters.setdefault(name, (shape, []))[1].extend(parts)
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
            parameters={n: Parameter(shape=shape, pieces=tuple(parts)) for n, (shape, parts) in parameters.items()},
            files=files,
            metrics=metrics,
            fingerprints=self.fingerprints,
            precision=self.plan.precision,
            probe_tolerance=PROBE_TOLERANCE[self.plan.precision],
        )

    def _complete(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        write_manifest(temporary, manifest)
        sync_path(temporary)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_path(final.parent)
        read_manifest(final)  # what cannot be read again must not replace what can
        for old in list_checkpoints(final.parent)[self.plan.run.checkpoint.keep_last :]:
            if old != final:
                shutil.rmtree(old)

    def _attempt(self, action: Any) -> str | None:
        try:
            action()
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            return f"rank {self.ranks.rank}: {error}"
        return None

    def _raise_together(self, problem: str | None, final: Path) -> None:
        """Fail on all ranks if one has failed, so that none waits for it."""
        problems = [found for found in self.ranks.gather_objects(problem) if found]
        if problems:
            raise CheckpointError(
                f"{final}: could not be saved ({'; '.join(problems)}); free space or mend the folder, then start again"
            )

    # ---------------------------------------------------------------- restore

    def restore_latest(self) -> TrainState | None:
        """Load the newest intact checkpoint into the engine; collective. None if there is none.

        Raises:
            CheckpointError: it belongs to another model, or there are checkpoints but none is intact.
        """
        if self.directory is None:
            return None
        folders = self.ranks.broadcast_object(list_checkpoints(self.directory))
        damaged: list[Path] = []
        for folder in folders:
            reader = self._open_intact(folder)
            if reader is None:
                damaged.append(folder)
                continue
            require_unchanged(reader, self.plan, self.fingerprints, self.console)
            self._load_together(reader)
            self._set_aside(damaged)
            updates = reader.manifest.updates_done if self._has_moments(reader) else 0
            state = TrainState(reader.manifest.step, reader.manifest.samples, updates)
            self.console.say(f"resumed from {folder} (step {state.step})")
            return state
        if damaged:
            raise CheckpointError(
                f"checkpoint.directory={self.directory}: none of its {len(damaged)} checkpoints is intact; restore one "
                "from a backup, or give another directory to start afresh"
            )
        return None

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that retention does not count them as the newest; nothing is deleted."""
        if self.ranks.rank == 0:
            for folder in damaged:
                kept = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
                with contextlib.suppress(OSError):  # a folder that cannot be renamed is skipped again next time
                    folder.rename(kept)
                    self.console.warn(f"{folder} is kept as {kept.name}")
        self.ranks.barrier()

    def _load_together(self, reader: CheckpointReader) -> None:
        names = {name for part in self.ranks.gather_objects(list(self.engine.parameters)) for name in part}
        if unused := sorted(set(reader.names) - names):
            raise CheckpointError(
                f"{reader.folder}: the model has no place for {', '.join(unused[:3])}{' ...' if unused[3:] else ''}; "
                "such a change of the model cannot be forced"
            )
        problem = None
        try:
            self._load(reader)
        except CheckpointError as error:
            problem = str(error)
        found = [problem for problem in self.ranks.gather_objects(problem) if problem]
        if found:
            raise CheckpointError(found[0])

    def _open_intact(self, folder: Path) -> CheckpointReader | None:
        reader, problems = None, []
        try:
            reader = CheckpointReader(folder)
            problems = reader.problems(self.ranks.rank, self.ranks.world_size)
        except CheckpointError as error:
            problems = [str(error)]
        found = sorted({problem for part in self.ranks.gather_objects(problems) for problem in part})
        for problem in found:
            self.console.warn(f"{problem}; this checkpoint is skipped and the next older one is tried")
        return None if found else reader

    def _has_moments(self, reader: CheckpointReader) -> bool:
        return set(self._moments) <= set(reader.manifest.moments)

    def _load(self, reader: CheckpointReader) -> None:
        manifest, plan, ranks = reader.manifest, self.plan, self.ranks

        def read(name: str, kind: str) -> Tensor:
            return reader.shard(name, kind, ranks.tensor_rank, ranks.tensor_size, plan.padded_vocab_size)

        fragments = {fragment.name: fragment for fragment in self.engine.fragments()}
        same_optimizer = self._has_moments(reader)
        if not same_optimizer:
            self.console.warn(f"{reader.folder} has no {', '.join(self._moments)}: the optimizer starts afresh")
        with torch.no_grad():
            for name in self.engine.parameters:
                shard = read(name, "weight")
                if tuple(shard.shape) != self.engine.shard_shape(name):
                    raise CheckpointError(
                        f"{reader.folder}: {name} is {list(shard.shape)} on this rank, the model wants "
                        f"{list(self.engine.shard_shape(name))}; such a change of the model cannot be forced"
                    )
                self.engine.load_weight(name, shard)
                fragment = fragments.get(name)
                if fragment is None:
                    continue
                part = slice(fragment.start, fragment.stop)
                fragment.master.copy_(shard.flatten()[part])
                if same_optimizer:
                    fragment.prepare_state(manifest.updates_done, self._moments)
                    for key in self._moments:
                        fragment.moment(key).copy_(read(name, key).flatten()[part])
        if manifest.loss_scale is not None:
            self.engine.set_loss_scale_state(manifest.loss_scale.model_dump())
        context = reader.run.parallel.context_parallel_size
        layout = (manifest.world_size, manifest.tensor_parallel_size, context, manifest.pipeline_parallel_size)
        sizes = plan.tensor_parallel_size, plan.context_parallel_size, plan.pipeline_parallel_size
        if layout == (plan.world_size, *sizes):
            set_rng_state(reader.rng(ranks.rank))


def probe_tokens(plan: Plan) -> Tensor:
    """A fixed micro-batch of token ids, [micro-batch size, sequence length]; all rows are the same."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, plan.model.vocab_size, (1, plan.seq_length), generator=generator)
    return row.repeat(plan.microbatch_size, 1)


def _write(path: Path, tensors: dict[str, Tensor]) -> File:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
    sync_path(path)
    return File(bytes=path.stat().st_size, sha256=sha256_of(path))
