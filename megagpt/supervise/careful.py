"""Train steps that are taken back or taken again when their numbers are not to be trusted.

A step whose loss or gradient norm is no number, or a spike, updates nothing. It is computed once more from the same
samples and the same random numbers: if all is well then, the hardware or a transfer erred, and the run goes on as if
nothing had been. If not, the samples are skipped. Now and then a good step is computed twice and compared.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megagpt.errors import UnreliableError
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.rng import rng_state, set_rng_state
from megagpt.plan import Plan
from megagpt.supervise.judge import SpikeJudge
from megagpt.supervise.replicas import differing_replicas

Item = TypeVar("Item")
SKIPPED_FILE = "skipped.jsonl"
RELATIVE_TOLERANCE = 1e-3
"""Within which loss and norm of a step that is computed again agree: GPUs add up in varying order."""


class SteppingEngine(Protocol):
    """What is needed of an engine."""

    parameters: dict[str, Any]

    def train_step(
        self,
        batches: Iterator[Any],
        learning_rate: float,
        *,
        rehearsal: bool = False,
        check: Callable[[], str | None] | None = None,
    ) -> Any: ...
    def loss_scale_state(self) -> dict[str, float] | None: ...
    def set_loss_scale_state(self, state: dict[str, float]) -> None: ...


class Rewindable(Iterator[Item]):
    """An iterator that can go back to its last mark.

    Args:
        items: where they come from.
    """

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self._since_mark: list[Item] = []
        self._next = 0

    def mark(self) -> None:
        """Forget what was given so far."""
        del self._since_mark[: self._next]
        self._next = 0

    def rewind(self) -> None:
        """Give again what came since the mark."""
        self._next = 0

    def __next__(self) -> Item:
        if self._next == len(self._since_mark):
            self._since_mark.append(next(self._items))
        self._next += 1
        return self._since_mark[self._next - 1]


class CarefulSteps:
    """Takes the train steps of a run.

    Args:
        plan: of the run.
        engine: asks `judge_of(plan)` before its updates.
        ranks: this process's place.
        say: prints a line on rank 0, does nothing elsewhere.
    """

    def __init__(self, plan: Plan, engine: SteppingEngine, ranks: Ranks, say: Callable[[str], None]):
        self.plan, self.engine, self.ranks, self._say = plan, engine, ranks, say
        supervision, directory = plan.run.supervision, plan.run.logging.directory
        self._is_judged = supervision.max_bad_steps > 0
        self._log = Path(directory) / SKIPPED_FILE if ranks.rank == 0 and directory else None
        self._has_dropout = plan.model.hidden_dropout > 0 or plan.model.attention_dropout > 0
        self.bad_in_a_row = 0
        """Steps whose update was not made, up to the last one."""
        self.last_problem = ""
        self.num_skipped = 0
        """Those of this process altogether."""

    def take(self, batches: Rewindable, learning_rate: float, step: int, first_sample: int) -> Any:
        """Take one step; the result's `problem` says why its update was not made.

        Args:
            batches: this data-parallel rank's micro-batches.
            learning_rate: of the update.
            step: number of the step, from 1.
            first_sample: samples that the run has consumed before.

        Raises:
            UnreliableError: the step gave other figures when it was computed again, or the copies of weights differ; on
                all ranks.
        """
        if not self._is_judged:
            return self.engine.train_step(batches, learning_rate)
        supervision = self.plan.run.supervision
        batches.mark()
        random = rng_state() if self._has_dropout else None
        rehearsed = None
        if _due(step, supervision.recompute_interval):
            rehearsed = self._rehearse(batches, learning_rate, random)
        check = self._compare_copies if _due(step, supervision.replica_check_interval) else None
        result = self.engine.train_step(batches, learning_rate, check=check)
        if rehearsed is not None and not result.skipped:
            self._compare(step, rehearsed, result)
        if result.problem is not None:
            problem = result.problem
            self._rewind(batches, random)
            result = self.engine.train_step(batches, learning_rate, check=check)
            if result.problem is None:
                self._say(
                    f"step {step}: {problem}; computed again from the same samples all is well, so the run goes on "
                    "undisturbed: a device or a transfer has erred"
                )
        self.bad_in_a_row = self.bad_in_a_row + 1 if result.problem is not None else 0
        if result.problem is not None:
            self._note(step, first_sample, first_sample + self.plan.global_batch_size, result.problem)
        return result

    def note_return(self, step: int, first: int, behind: int) -> None:
        """Samples `first` ... `behind` - 1 are skipped as the run goes back to `step`."""
        self.bad_in_a_row = 0
        self._write(step, first, behind, "the run went back to its last checkpoint")

    def _note(self, step: int, first: int, behind: int, problem: str) -> None:
        self.num_skipped += 1
        self.last_problem = problem
        self._write(step, first, behind, problem)
        self._say(
            f"step {step}: {problem}: no weight was updated; samples {first:,} ... {behind - 1:,} are skipped "
            f"({self.bad_in_a_row} in a row, {self.num_skipped} in all)"
        )

    def _write(self, step: int, first: int, behind: int, problem: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps({"step": step, "samples": [first, behind], "why": problem}) + "\n")

    def _compare_copies(self) -> str | None:
        # Before an update, which would give all of them the same weights again. Which copy is right nobody knows.
        if (found := differing_replicas(self.engine.parameters, self.ranks)) is not None:
            problem, suspects = found
            raise UnreliableError(
                f"{problem}: a device or a transfer errs silently; the last checkpoint is from before", suspects
            )
        return None

    def _rehearse(self, batches: Rewindable, rate: float, random: dict[str, torch.Tensor] | None) -> Any:
        """Compute a step that updates nothing, and have all as before."""
        scale = self.engine.loss_scale_state()
        result = self.engine.train_step(batches, rate, rehearsal=True)
        if scale is not None:
            self.engine.set_loss_scale_state(scale)
        self._rewind(batches, random)
        return result

    def _rewind(self, batches: Rewindable, random: dict[str, torch.Tensor] | None) -> None:
        batches.rewind()
        if random is not None:
            set_rng_state(random)

    def _compare(self, step: int, rehearsed: Any, result: Any) -> None:
        for name in ("loss", "grad_norm"):
            one, other = float(getattr(rehearsed, name)), float(getattr(result, name))
            if not math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE):
                raise UnreliableError(
                    f"step {step}: computed twice from the same samples, {name} was {one:.6g} and then {other:.6g}: a "
                    "device or a transfer errs silently"
                )


def judge_of(plan: Plan) -> SpikeJudge | None:
    """Who judges the steps of a run; None if nothing is to be skipped."""
    supervision = plan.run.supervision
    return SpikeJudge(supervision.spike_threshold) if supervision.max_bad_steps else None


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
