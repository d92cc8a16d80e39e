"""Verify a layout: shrink it, run it on local processes and in one process, and compare."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megagpt.parallel.console import muted
from megagpt.parallel.local_gpus import gpu_environments, visible_gpus
from megagpt.parallel.local_ranks import run_ranks
from megagpt.plan import Plan
from megagpt.verify.shrink import MAX_RANKS, SmallRun, shrink

if TYPE_CHECKING:
    from megagpt.verify.verdicts import Verdict


@dataclass(frozen=True)
class Part:
    """Verdicts on one small run."""

    changes: tuple[str, ...]
    """How the verified run differs from the run that was asked about."""
    runs: "dict[str, list[Verdict]]"
    """Verdicts by variant: one exact, one as configured."""

    def lines(self) -> list[str]:
        """For people, 100 columns wide."""
        lines = [*self.changes]
        for title, verdicts in self.runs.items():
            lines += ["", title]
            for verdict in verdicts:
                word = "ok" if verdict.passed else "WRONG"
                numbers = f"{verdict.difference:>9.1e} <= {verdict.bound:<7.1e}"
                lines.append(f"  {word:<6}{verdict.quantity:<31}{numbers}  {verdict.detail}")
        return [*lines, ""]


@dataclass(frozen=True)
class Report:
    """Verdicts on one layout."""

    parts: tuple[Part, ...]
    left_out: tuple[str, ...]
    """Kinds of neighbours, and pairs of them, that no run of so few ranks has."""

    @property
    def passed(self) -> bool:
        """Whether every verdict is good."""
        return all(verdict.passed for part in self.parts for verdicts in part.runs.values() for verdict in verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = [
            {
                "changes": list(part.changes),
                "runs": {title: [verdict.as_dict() for verdict in verdicts] for title, verdicts in part.runs.items()},
            }
            for part in self.parts
        ]
        return {"passed": self.passed, "parts": parts, "left_out": list(self.left_out)}

    def text(self) -> str:
        """A table for people, 100 columns wide."""
        lines = [line for part in self.parts for line in part.lines()]
        if self.left_out:
            lines += [f"not verified, as it takes more than --max-ranks: {', '.join(self.left_out)}", ""]
        lines.append("the layout trains the model of one process" if self.passed else "THE LAYOUT IS WRONG")
        return "\n".join(lines).lstrip()


def verify_layout(plan: Plan, steps: int = 20, max_ranks: int = MAX_RANKS, on_gpus: bool = False) -> Report:
    """Verify the layout of a run on processes of this host.

    Args:
        plan: the run, of any size.
        steps: updates to compare.
        max_ranks: processes that may be started at a time.
        on_gpus: whether the ranks compute on this host's GPUs, which they share if there are fewer; the one process
            computes on the CPU all the same.

    Raises:
        ConfigError: `max_ranks` is too few, or the shrunk run breaks a rule.
        LaunchError: there is no GPU.
        RankFailedError: a rank failed.
    """
    small = shrink(plan, steps, max_ranks)
    places = environments_of_ranks(max_ranks) if on_gpus else None
    import_libraries()
    return Report(tuple(_verify(run, places) for run in small.runs), small.left_out)


def environments_of_ranks(world_size: int) -> list[dict[str, str]]:
    """Environments of ranks that compute on this host's GPUs; to be asked for before `import_libraries`, which hides
    the GPUs from this process.

    Args:
        world_size: how many ranks at most.

    Raises:
        LaunchError: there is no GPU.
    """
    return gpu_environments(visible_gpus(), world_size)


def _verify(small: SmallRun, places: list[dict[str, str]] | None) -> Part:
    plans = {f"exact: {_kind(small.exact)}": small.exact, f"as configured: {_kind(small.configured)}": small.configured}
    from megagpt.verify.measure import measure_references, measure_runs
    from megagpt.verify.verdicts import judge

    (references,) = run_ranks(measure_references, 1, list(plans.values()), timeout=600)
    by_rank = run_ranks(measure_runs, small.exact.world_size, list(plans.values()), timeout=600, environments=places)
    runs = {
        title: judge(variant, [measurements[index] for measurements in by_rank], references[index])
        for index, (title, variant) in enumerate(plans.items())
    }
    return Part(small.changes, runs)


def _kind(plan: Plan) -> str:
    return f"{plan.precision}, {plan.run.optimizer.name}, ZeRO {plan.zero_stage}"


def import_libraries() -> None:
    """Import torch, DeepSpeed and Megatron-Core for the CPU, once for all ranks that are forked from this process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forked processes could not use a GPU
    with muted(verbose=False):
        import torch

        torch.set_num_threads(1)
        from megagpt.parallel.without_cuda import prepare_deepspeed, support_hosts_without_cuda

        prepare_deepspeed()
        support_hosts_without_cuda()
        import megagpt.verify.measure  # noqa: F401
