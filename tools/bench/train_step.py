"""Tokens per second and memory of one process: megagpt, a plain torch loop around transformers, and the Trainer.

All sides train the same model with the same batches, threads and optimizer, each in its own process; they take turns,
so that a change of the machine's speed meets them all. bf16 means fp32 master weights everywhere (autocast in torch and
the Trainer); `torch-pure`, which keeps weights and moments in bf16 too, is shown beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from workload import SIZES, Size

from megagpt.errors import MegagptError, run_command

GOALS = {"torch": 1.2, "trainer": 1.3}
"""How many times the tokens/s of a side megagpt shall reach, with a peak memory no higher."""
SIDES = {"fp32": ("megagpt", "torch", "trainer"), "bf16": ("megagpt", "torch", "trainer", "torch-pure")}
ON_REQUEST = ("megagpt-sequential",)
"""Sides that run only if `--sides` names them: experts one after the other."""


class BenchError(MegagptError):
    """A side could not be run."""


@dataclass
class Side:
    """A side's process and what it has answered."""

    name: str
    process: subprocess.Popen
    log: TextIO
    seconds_per_step: list[float] = field(default_factory=list)
    cpu_seconds_per_step: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    parameters: int = 0

    @classmethod
    def start(cls, name: str, size: str, precision: str, threads: int) -> "Side":
        """Start the process; `wait_ready` waits for it."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sides.py")), name, size, precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        return cls(name, process, log)

    def wait_ready(self) -> int:
        """Wait until the model stands; returns its number of parameters."""
        return self._answer()["ready"]

    def run(self, steps: int, warm_up: bool = False) -> None:
        """Have it do some steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        if not warm_up:
            self.seconds_per_step.append(answer["seconds"] / steps)
            self.cpu_seconds_per_step.append(answer["cpu_seconds"] / steps)

    def end(self) -> None:
        """Close its input, upon which it leaves."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise BenchError(f"{self.name} ended with status {self.process.returncode}:\n{self.log.read()[-3000:]}")
        return json.loads(line)


def measure(
    names: Sequence[str], size: str, precision: str, threads: int, rounds: int, steps: int, one_by_one: bool = False
) -> list[Side]:
    """Run sides.

    Args:
        names: of the sides; the first is what the others are compared with.
        size: key of `workload.SIZES`.
        precision: fp32 or bf16.
        threads: CPU threads of each side.
        rounds: turns of each side, after one that is not counted.
        steps: optimizer steps per turn.
        one_by_one: let each side end before the next one starts, rather than take turns.
    """
    groups = [[name] for name in names] if one_by_one else [list(names)]
    sides = [side for group in groups for side in take_turns(group, size, precision, threads, rounds, steps)]
    for side in sides:
        if side.parameters != sides[0].parameters:
            raise BenchError(f"{side.name} has {side.parameters:,} parameters, {sides[0].name} {sides[0].parameters:,}")
    return sides


def take_turns(names: Sequence[str], size: str, precision: str, threads: int, rounds: int, steps: int) -> list[Side]:
    """Start sides and run them in turn; arguments as for `measure`."""
    sides = []
    try:
        for name in names:  # one after the other: starting is work too
            side = Side.start(name, size, precision, threads)
            sides.append(side)
            side.parameters = side.wait_ready()
        for side in sides:
            side.run(2, warm_up=True)
        for _ in range(rounds):
            for side in sides:
                side.run(steps)
    finally:
        for side in sides:
            side.end()
    return sides


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over turns of their time by ours: both sides of a turn have met the same speed of the machine."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def report(console: Console, title: str, size: Size, sides: list[Side]) -> list[str]:
    """Print a table; returns one line per goal that is missed."""
    table = Table(title=title, title_justify="left")
    table.add_column("side", no_wrap=True)
    for column in ("tokens/s median", "best", "megagpt is", "in CPU time", "peak GB", "of megagpt's"):
        table.add_column(column, justify="right")
    ours, missed = sides[0], []
    for side in sides:
        median, best = statistics.median(side.seconds_per_step), min(side.seconds_per_step)
        ratio = median_ratio(side.seconds_per_step, ours.seconds_per_step)
        cpu_ratio = median_ratio(side.cpu_seconds_per_step, ours.cpu_seconds_per_step)
        memory = side.peak_bytes / ours.peak_bytes
        table.add_row(
            side.name,
            f"{size.tokens_per_step / median:,.0f}",
            f"{size.tokens_per_step / best:,.0f}",
            f"{ratio:.2f} x" if side is not ours else "",
            f"{cpu_ratio:.2f} x" if side is not ours else "",
            f"{side.peak_bytes / 1e9:.2f}",
            f"{memory:.2f}",
        )
        goal = GOALS.get(side.name)
        if goal is not None and ratio < goal:
            missed.append(f"{title}: {ratio:.2f} x {side.name}, the goal is {goal}")
        if goal is not None and memory < 1:
            missed.append(f"{title}: megagpt's peak memory is {1 / memory:.2f} x that of {side.name}, the goal is 1")
    console.print(table)
    return missed


def main() -> int:
    """Measure what the command line asks for; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["12m", "125m"])
    parser.add_argument("--precisions", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=[*SIDES["bf16"][1:], *ON_REQUEST],
        help="compare megagpt with these only (default: with all, experts one after the other apart)",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side; default 5")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn; default 2")
    parser.add_argument(
        "--one-by-one", action="store_true", help="no turns: for GPUs that have no memory for all sides at a time"
    )
    args = parser.parse_args()
    console, missed, judged = Console(highlight=False), [], set()
    for size in args.sizes:
        for precision in args.precisions:
            for threads in args.threads:
                allowed = SIDES[precision] + ON_REQUEST
                names = [name for name in ["megagpt", *(args.sides or SIDES[precision][1:])] if name in allowed]
                sides = measure(names, size, precision, threads, args.rounds, args.steps, args.one_by_one)
                title = f"{size}, {precision}, {threads} thread{'s' * (threads > 1)}"
                missed += report(console, title, SIZES[size], sides)
                judged |= {side.name for side in sides} & GOALS.keys()
    for line in missed:
        console.print(f"missed: {line}")
    if judged and not missed:
        goals = (f"{goal} x {side}" for side, goal in GOALS.items() if side in judged)
        console.print("all goals met: " + ", ".join(goals))
    return 1 if missed else 0


if __name__ == "__main__":
    run_command(main)
