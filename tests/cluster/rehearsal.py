"""Drills on one cluster, one after the other, each against the losses of a run that nothing has disturbed."""

import contextlib
import time

from bed import Cluster
from drilling import Drill, Fault, Met, leftovers
from small_runs import DECAY_STEPS, Run, write_data


class Rehearsal:
    """All drills on one cluster.

    Args:
        cluster: that is healthy between drills.
    """

    def __init__(self, cluster: Cluster):
        self.cluster, self.dataset = cluster, write_data(cluster)
        self._undisturbed: dict[str, dict[int, float]] = {}
        self._count = 0
        self.transcript = ""
        """All that the last drill has printed."""

    def run(self, steps: int, sections: tuple[tuple[str, dict], ...] = ()) -> Run:
        """A new run."""
        self._count += 1
        sections = tuple(
            (name, {key: self._filled(value) for key, value in section.items()}) for name, section in sections
        )
        return Run(self.cluster.folder.parent / f"run-{self._count}", self.dataset, steps, **dict(sections))

    def _filled(self, value: object) -> object:
        return value.format(disk=self.cluster.disk) if isinstance(value, str) else value

    def undisturbed(self, sections: tuple[tuple[str, dict], ...]) -> dict[int, float]:
        """Losses of one host for a layout, as far as the longest drill goes."""
        layout = tuple((name, section) for name, section in sections if name == "parallel")
        if str(layout) not in self._undisturbed:
            self._undisturbed[str(layout)] = self.run(DECAY_STEPS, layout).on_one_host(self.cluster)
        return self._undisturbed[str(layout)]

    def drill(self, *faults: Fault) -> list[Met]:
        """Have one run meet some faults one after the other, and see that it ends as if it had not.

        Args:
            faults: what is planted, and where the run differs from others, the first one says for all.

        Raises:
            AssertionError: it did not.
        """
        first = faults[0]
        expected = self.undisturbed(first.sections)
        run = self.run(min(8 + sum(fault.steps for fault in faults), DECAY_STEPS), first.sections)
        drill = Drill(self.cluster, run, first)
        try:
            met = [drill.meet(fault) for fault in faults]
            self._judge(drill, drill.finish(), faults[-1].then == "given up", expected)
            self._require_clean()
        except AssertionError:
            for fault in faults:
                with contextlib.suppress(AssertionError):
                    fault.mend(drill)
            raise
        finally:
            self.transcript = drill.output()
            self.heal(drill)
        return met

    def _judge(self, drill: Drill, state: str, is_given_up: bool, expected: dict[int, float]) -> None:
        assert "Traceback" not in drill.output(), drill.output()
        if is_given_up:
            assert state == "FAILED", f"the job is {state}\n{drill.output()}"
            return
        assert state == "COMPLETED", f"the job is {state}\n{drill.output()}"
        losses = drill.run.losses()
        wrong = {step: loss for step, loss in losses.items() if loss != expected[step]}
        assert len(losses) == drill.run.steps, f"{len(losses)} of {drill.run.steps} steps were reported"
        assert not wrong, f"other losses than undisturbed: {wrong}"

    def _require_clean(self) -> None:
        deadline = time.monotonic() + 10.0
        while (left := leftovers(self.cluster)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left, f"left behind: {left}"

    def heal(self, drill: Drill) -> None:
        """Have all nodes idle again."""
        self.cluster.control("run", "head", "scancel", *dict.fromkeys((drill.first_job, drill.job)))
        for host in self.cluster.nodes:
            if not self.cluster.is_up(host):
                self.cluster.control("heal-node", host)
        self.cluster.wait_until_idle()
