"""A tiny run that a test takes step by step, with its checkpoints."""

import dataclasses
from pathlib import Path

from tiny import rank_batches, tiny_plan

from megagpt.plan import Plan


def plan_in(directory: str | Path, **layout) -> Plan:
    """A tiny plan that keeps its checkpoints there; `checkpoint` and all other keys are those of `tiny_plan`."""
    checkpoint = {"directory": str(directory), **layout.pop("checkpoint", {})}
    return tiny_plan(sections={"checkpoint": checkpoint}, **layout)


class SteppedRun:
    """The part of a run that is this rank's."""

    def __init__(self, plan: Plan):
        from megagpt.checkpoint import Checkpoints, TrainState
        from megagpt.engine import build_engine
        from megagpt.parallel.console import Console
        from megagpt.parallel.launch import detect_launch
        from megagpt.parallel.ranks import start_ranks

        self.plan = plan
        self.ranks = start_ranks(plan, detect_launch())
        self.engine = build_engine(plan, self.ranks)
        self.checkpoints = Checkpoints(plan, self.engine, self.ranks, Console(1))
        self.state = TrainState()

    def step(self) -> float:
        """Take a step; its loss."""
        batches = rank_batches(self.plan, self.ranks.data_rank, self.state.step)
        loss = self.engine.train_step(batches, 1e-3).loss
        self.state = self.state.advance(8)
        self.checkpoints.poll()
        return float(loss)

    def save(self, **metrics: float) -> None:
        self.checkpoints.save(dataclasses.replace(self.state, evaluated=bool(metrics)), metrics)

    def resume(self) -> None:
        self.state = self.checkpoints.restore_latest()
