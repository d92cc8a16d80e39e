"""Restore a run: find the newest intact checkpoint, load what this rank needs in this layout, check all of it."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.changes import require_unchanged
from megagpt.checkpoint.reader import CheckpointReader, list_checkpoints
from megagpt.checkpoint.state import TrainedModel
from megagpt.checkpoint.tensor_file import DamagedError
from megagpt.errors import CheckpointError
from megagpt.optim import MOMENTS
from megagpt.parallel.console import Console
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.rng import set_rng_state
from megagpt.plan import Plan


class Restorer:
    """Loads checkpoints into an engine.

    A file is checked while it is loaded, in one pass. Damage shows, therefore, when a part of the state is loaded
    already; the older checkpoint that is loaded then replaces all of it.

    Args:
        plan: the layout.
        engine: the model.
        ranks: this process's place.
        console: for messages.
        fingerprints: hashes of the run's `dataset` and `tokenizer`.
    """

    def __init__(
        self, plan: Plan, engine: TrainedModel, ranks: Ranks, console: Console, fingerprints: Mapping[str, str]
    ):
        self.plan, self.engine, self.ranks, self.console = plan, engine, ranks, console
        self.fingerprints = fingerprints
        self._moments = MOMENTS[plan.run.optimizer.name]

    def restore_newest(self, directory: Path) -> CheckpointReader | None:
        """Load the newest intact checkpoint under a directory; collective. None if there is none at all.

        Raises:
            CheckpointError: it belongs to another model, or there are checkpoints but none is intact.
        """
        folders = self.ranks.broadcast_object(list_checkpoints(directory))
        damaged: list[Path] = []
        for folder in folders:
            reader = self._load_intact(folder)
            if reader is not None:
                self._set_aside(damaged)
                self.console.say(f"resumed from {folder} (step {reader.manifest.step})")
                return reader
            damaged.append(folder)
        if damaged:
            raise CheckpointError(
                f"checkpoint.directory={directory}: none of its {len(damaged)} checkpoints is intact; restore one "
                "from a backup, or give another directory to start afresh"
            )
        return None

    def has_moments(self, reader: CheckpointReader) -> bool:
        """Whether the checkpoint has the state of this run's optimizer."""
        return set(self._moments) <= set(reader.manifest.moments)

    def _load_intact(self, folder: Path) -> CheckpointReader | None:
        """Load a checkpoint; None if it is damaged, which is told.

        Raises:
            CheckpointError: it is another run's.
        """
        reader, problems = None, []
        try:
            reader = CheckpointReader(folder)
            problems = reader.problems(self.ranks.rank, self.ranks.world_size, with_hash=False)
        except CheckpointError as error:
            problems = [str(error)]
        if not self._all_intact(problems):
            return None
        assert reader is not None
        require_unchanged(reader, self.plan, self.fingerprints, self.console)
        self._require_all_used(reader)
        refusal, problems = None, []
        try:
            self._load(reader)
        except DamagedError as error:
            problems = [str(error)]
        except CheckpointError as error:
            refusal = str(error)
        if refusals := [found for found in self.ranks.gather_objects(refusal) if found]:
            raise CheckpointError(refusals[0])
        if not self._all_intact(problems):
            return None
        checked = {name for names in self.ranks.gather_objects(reader.verified_files()) for name in names}
        rest = sorted(set(reader.manifest.files) - checked)[self.ranks.rank :: self.ranks.world_size]
        if not self._all_intact([problem for name in rest if (problem := reader.file_problem(name))]):
            return None
        self._restore_rng(reader)
        return reader

    def _all_intact(self, problems: list[str]) -> bool:
        """Tell what is wrong on any rank; whether nothing is."""
        found = sorted({problem for part in self.ranks.gather_objects(problems) for problem in part})
        for problem in found:
            self.console.warn(f"{problem}; this checkpoint is skipped and the next older one is tried")
        return not found

    def _require_all_used(self, reader: CheckpointReader) -> None:
        names = {name for part in self.ranks.gather_objects(list(self.engine.parameters)) for name in part}
        if unused := sorted(set(reader.names) - names):
            raise CheckpointError(
                f"{reader.folder}: the model has no place for {', '.join(unused[:3])}{' ...' if unused[3:] else ''}; "
                "such a change of the model cannot be forced"
            )

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that retention does not count them as the newest; nothing is deleted."""
        if self.ranks.rank == 0:
            for folder in damaged:
                kept = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
                with contextlib.suppress(OSError):  # a folder that cannot be renamed is skipped again next time
                    folder.rename(kept)
                    self.console.warn(f"{folder} is kept as {kept.name}")
        self.ranks.barrier()

    @torch.no_grad()
    def _load(self, reader: CheckpointReader) -> None:
        fragments = {fragment.name: fragment for fragment in self.engine.fragments()}
        same_optimizer = self.has_moments(reader)
        if not same_optimizer:
            self.console.warn(f"{reader.folder} has no {', '.join(self._moments)}: the optimizer starts afresh")
        for name in self.engine.parameters:
            shard = self._read(reader, name, "weight")
            self.engine.load_weight(name, shard)
            fragment = fragments.get(name)
            if fragment is None:
                continue
            fragment.master.copy_(shard.flatten()[fragment.start : fragment.stop])
            fragment.prepare_state(reader.manifest.updates_done if same_optimizer else 0, self._moments)
            for key in self._moments:
                if same_optimizer:
                    part = self._read_part(reader, name, key, fragment.start, fragment.stop)
                    fragment.moment(key).copy_(part)
                else:
                    fragment.moment(key).zero_()
        if reader.manifest.loss_scale is not None:
            self.engine.set_loss_scale_state(reader.manifest.loss_scale.model_dump())

    def _read(self, reader: CheckpointReader, name: str, kind: str) -> Tensor:
        """This rank's shard; valid until the next one is read."""
        if name not in reader.manifest.parameters:
            raise CheckpointError(
                f"{reader.folder}: has no parameter {name}; such a change of the model cannot be forced"
            )
        shape = self.engine.shard_shape(name)
        shard = reader.shard(
            name, kind, self.ranks.tensor_rank, self.ranks.tensor_size, self.plan.padded_vocab_size, borrowed=True
        )
        if tuple(shard.shape) != shape:
            raise CheckpointError(
                f"{reader.folder}: {name} is {list(shard.shape)} on this rank, the model wants {list(shape)}; such a "
                "change of the model cannot be forced"
            )
        return shard

    def _read_part(self, reader: CheckpointReader, name: str, kind: str, start: int, stop: int) -> Tensor:
        ranks = self.ranks
        return reader.part_of_shard(
            name, kind, ranks.tensor_rank, ranks.tensor_size, self.plan.padded_vocab_size, start, stop
        )

    def _restore_rng(self, reader: CheckpointReader) -> None:
        """Dropout goes on where it was, if every rank has the same place as before."""
        manifest, plan = reader.manifest, self.plan
        context = reader.run.parallel.context_parallel_size
        layout = (manifest.world_size, manifest.tensor_parallel_size, context, manifest.pipeline_parallel_size)
        sizes = plan.tensor_parallel_size, plan.context_parallel_size, plan.pipeline_parallel_size
        if layout == (plan.world_size, *sizes):
            set_rng_state(reader.rng(self.ranks.rank))
