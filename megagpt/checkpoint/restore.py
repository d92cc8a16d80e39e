"""Restore a run: find the newest intact checkpoint, load what this rank needs in this layout, check all of it."""

import contextlib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.changes import require_unchanged
from megagpt.checkpoint.reader import CheckpointReader, list_checkpoints
from megagpt.checkpoint.state import TrainedModel
from megagpt.checkpoint.tensor_file import DamagedError
from megagpt.errors import CheckpointError, OtherVersionError, StorageError
from megagpt.host_tensors import one_thread
from megagpt.optim import MOMENTS
from megagpt.parallel.console import Console
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.rng import set_rng_state
from megagpt.plan import Plan
from megagpt.storage import Location
from megagpt.storage.location import rename

DAMAGED_PREFIX = "damaged-"
"""In front of the name of a checkpoint that was found damaged."""

READING_THREADS = 2
"""Of each rank: one reads while the other one compares a hash."""


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

    def restore_newest(self, directory: Location) -> CheckpointReader | None:
        """Load the newest intact checkpoint under a directory; collective. None if there is none at all.

        Raises:
            CheckpointError: it belongs to another model, or there are checkpoints but none is intact.
            StorageError: the store refuses or does not answer; on all ranks.
        """
        folders, problem = self.ranks.broadcast_object(self._list(directory) if self.ranks.rank == 0 else ([], None))
        if problem is not None:
            raise problem
        damaged: list[Location] = []
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

    def _list(self, directory: Location) -> tuple[list[Location], StorageError | None]:
        try:
            return list_checkpoints(directory), None
        except StorageError as error:
            return [], error

    def _load_intact(self, folder: Location) -> CheckpointReader | None:
        """Load a checkpoint; None if it is damaged, which is told.

        Raises:
            CheckpointError: it is another run's, or was written by another version.
            StorageError: the store fails some rank, which says nothing about the checkpoint.
        """
        reader, problems = None, []
        failure: CheckpointError | StorageError | None = None
        try:
            reader = CheckpointReader(folder)
            problems = reader.problems(self.ranks.rank, self.ranks.world_size, with_hash=False)
        except OtherVersionError as error:  # no damage: whoever passed it over would lose what was trained since
            failure = error
        except CheckpointError as error:
            problems = [str(error)]
        except StorageError as error:
            failure = error
        if not self._all_intact(problems, failure):
            return None
        assert reader is not None
        require_unchanged(reader, self.plan, self.fingerprints, self.console)
        self._require_all_used(reader)
        try:
            self._load(reader)
        except DamagedError as error:
            problems = [str(error)]
        except (CheckpointError, StorageError) as error:
            failure = error
        if not self._all_intact(problems, failure):
            return None
        checked = {name for names in self.ranks.gather_objects(reader.verified_files()) for name in names}
        rest = sorted(set(reader.manifest.files) - checked)[self.ranks.rank :: self.ranks.world_size]
        problems, rng = [], None
        try:
            problems = [problem for name in rest if (problem := reader.file_problem(name))]
            rng = self._rng(reader)
        except DamagedError as error:
            problems.append(str(error))
        except StorageError as error:
            failure = error
        if not self._all_intact(problems, failure):
            return None
        if rng is not None:
            set_rng_state(rng)
        return reader

    def _all_intact(self, problems: list[str], failure: Exception | None) -> bool:
        """Tell what is wrong on any rank; whether nothing is. What is no damage, but keeps any rank from going on, is
        raised on all ranks."""
        gathered = self.ranks.gather_objects((problems, failure))
        if failures := [failure for _, failure in gathered if failure is not None]:
            raise failures[0]
        found = sorted({problem for part, _ in gathered for problem in part})
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

    def _set_aside(self, damaged: list[Location]) -> None:
        """Rename damaged checkpoints, so that retention does not count them as the newest; nothing is deleted."""
        if self.ranks.rank == 0:
            for folder in damaged:
                kept = f"{DAMAGED_PREFIX}{folder.name}-{time.time_ns()}"
                with contextlib.suppress(OSError, StorageError):  # one that cannot be renamed is skipped again
                    rename(folder, kept)
                    self.console.warn(f"{folder} is kept as {kept}")
        self.ranks.barrier()

    def _load(self, reader: CheckpointReader) -> None:
        """Load weights, moments and loss scale, several parameters at a time: reading and hashing take turns."""
        same_optimizer = self.has_moments(reader)
        if not same_optimizer:
            self.console.warn(f"{reader.folder} has no {', '.join(self._moments)}: the optimizer starts afresh")
        for name in self.engine.parameters:
            self._require_shape(reader, name)
        owned = {fragment.name for fragment in self.engine.fragments()}
        rest = [name for name in self.engine.parameters if name not in owned]  # other ranks update them
        with one_thread(), contextlib.closing(self.engine.groups_in_memory(change=True)) as groups:
            for group in groups:
                for fragment in group:
                    fragment.prepare_state(reader.manifest.updates_done if same_optimizer else 0, self._moments)
                fragments = {fragment.name: fragment for fragment in group}
                self._load_parameters(reader, [*fragments, *rest], fragments, same_optimizer)
                rest = []
        if reader.manifest.loss_scale is not None:
            self.engine.set_loss_scale_state(reader.manifest.loss_scale.model_dump())

    def _load_parameters(
        self, reader: CheckpointReader, names: list[str], fragments: Mapping[str, Any], with_moments: bool
    ) -> None:
        stop = threading.Event()

        @torch.no_grad()
        def load(name: str) -> None:
            if stop.is_set():
                return
            try:
                self._load_parameter(reader, name, fragments.get(name), with_moments)
            except BaseException:
                stop.set()
                raise

        largest_first = sorted(names, key=lambda name: -prod(self.engine.shard_shape(name)))
        with ThreadPoolExecutor(READING_THREADS) as pool:
            for _ in pool.map(load, largest_first):
                pass

    def _load_parameter(self, reader: CheckpointReader, name: str, fragment: Any, with_moments: bool) -> None:
        place = self.ranks.tensor_rank, self.ranks.tensor_size, self.plan.padded_vocab_size
        shape = self.engine.shard_shape(name)
        if fragment is not None and fragment.master.numel() == prod(shape) and _is_readable(fragment.master):
            shard = reader.shard(name, "weight", *place, out=fragment.master.view(shape))
            self.engine.load_weight(name, shard)
        else:
            shard = reader.shard(name, "weight", *place, out=reader.scratch(shape))
            self.engine.load_weight(name, shard)
            if fragment is not None:
                fragment.master.copy_(shard.flatten()[fragment.start : fragment.stop])
        for key in self._moments if fragment is not None else ():
            moment = fragment.moment(key)
            if not with_moments:
                moment.zero_()
                continue
            part = moment if _is_readable(moment) else reader.scratch(tuple(moment.shape))
            reader.part_of_shard(name, key, *place, fragment.start, part)
            if part is not moment:
                moment.copy_(part)

    def _require_shape(self, reader: CheckpointReader, name: str) -> None:
        if name not in reader.manifest.parameters:
            raise CheckpointError(
                f"{reader.folder}: has no parameter {name}; such a change of the model cannot be forced"
            )
        shape = self.engine.shard_shape(name)
        found = reader.shard_shape(name, self.ranks.tensor_size, self.plan.padded_vocab_size)
        if found != shape:
            raise CheckpointError(
                f"{reader.folder}: {name} is {list(found)} on this rank, the model wants {list(shape)}; such a "
                "change of the model cannot be forced"
            )

    def _rng(self, reader: CheckpointReader) -> dict[str, Tensor] | None:
        """Random states to go on from: dropout goes on where it was, if every rank has the same place as before."""
        manifest, plan = reader.manifest, self.plan
        context = reader.run.parallel.context_parallel_size
        layout = (manifest.world_size, manifest.tensor_parallel_size, context, manifest.pipeline_parallel_size)
        sizes = plan.tensor_parallel_size, plan.context_parallel_size, plan.pipeline_parallel_size
        return reader.rng(self.ranks.rank) if layout == (plan.world_size, *sizes) else None


def _is_readable(tensor: Tensor) -> bool:
    """Whether a file can be read straight into it."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()
