"""Go back to the last checkpoint of a run when its weights are not to be trusted any more."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from megagpt.errors import TrainingError
from megagpt.plan import Plan
from megagpt.supervise.careful import CarefulSteps

MOST_PER_CHECKPOINT = 2
"""Returns to one checkpoint; a run that comes to grief again and again is given up."""


class Restoring(Protocol):
    """What is needed of the checkpoints."""

    def restore_latest(self) -> Any: ...


class Returning:
    """Knows how often the run has gone back, and to where.

    Args:
        plan: of the run.
        checkpoints: restores the newest one into the engine.
        careful: counts bad steps.
        say: prints a line on rank 0.
    """

    def __init__(self, plan: Plan, checkpoints: Restoring, careful: CarefulSteps, say: Callable[[str], None]):
        self.plan, self.checkpoints, self.careful, self._say = plan, checkpoints, careful, say
        self._returns: Counter[int] = Counter()

    def go_back(self, step: int, samples: int) -> Any:
        """The state to go on from; collective. The samples since the checkpoint are skipped, as published runs did
        (PaLM, arXiv 2204.02311, section 5.1).

        Args:
            step: where the run stands.
            samples: that it has consumed.

        Raises:
            TrainingError: there is no checkpoint to go back to, or that has not helped.
        """
        bad, problem = self.careful.bad_in_a_row, self.careful.last_problem
        restored = self.checkpoints.restore_latest()
        if restored is not None:
            self._returns[restored.step] += 1
        if restored is None or self._returns[restored.step] > MOST_PER_CHECKPOINT:
            why = "there is no checkpoint to go back to"
            if restored is not None:
                why = f"so it was after {MOST_PER_CHECKPOINT} returns to the checkpoint of step {restored.step}"
            raise TrainingError(f"step {step - bad + 1}: {problem}: {divergence_advice(self.plan)}; {why}")
        self.careful.note_return(restored.step, restored.samples, samples)
        self._say(
            f"step {step}: {bad} bad steps in a row; the run goes back to step {restored.step}, and samples "
            f"{restored.samples:,} ... {samples - 1:,} are skipped"
        )
        return dataclasses.replace(restored, samples=samples)


def divergence_advice(plan: Plan) -> str:
    """What to do about a run whose numbers are none."""
    directory = plan.run.checkpoint.directory
    saved = f"; the checkpoints in {directory} are from before" if directory else ""
    fp16 = ", bf16 instead of fp16 (which ends at 65,504)" if plan.precision == "fp16" else ""
    return (
        f"training has diverged; use a lower optimizer.lr (now {plan.run.optimizer.lr:g}), more optimizer.warmup_steps "
        f"(now {plan.run.optimizer.warmup_steps}){fp16} or a smaller gradient_clipping (now "
        f"{plan.gradient_clipping:g}); where only the gradient is none, a device may compute wrongly: "
        f"tools/doctor.py looks at all of them{saved}"
    )
