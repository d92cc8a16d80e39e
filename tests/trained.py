"""Runs of a tiny model, and what they have left: for tests of the train loop."""

import contextlib
import io
import json
from pathlib import Path

from tiny import ADAM, tiny_plan


def plan_in(folder: Path, dataset: dict, *, steps: int = 6, training=None, data=None, checkpoint=None, **layout):
    """A plan whose outputs go to `folder`."""
    sections = {
        "model": {"vocab_size": 300},
        "data": {**dataset, "split": [80, 10, 10], **(data or {})},
        "training": {"steps": steps, "eval_batches": 2, **(training or {})},
        "checkpoint": {"directory": str(folder / "checkpoints"), **(checkpoint or {})},
        "logging": {"directory": str(folder / "logs"), "interval": 4},
    }
    return tiny_plan("llama", layout.pop("optimizer", ADAM), sections=sections, **layout)


def train(plan, disturb=None) -> tuple[int, str, str]:
    """Exit status and what this rank says on stdout and stderr; `disturb(step)` runs before each update."""
    from megagpt.engine import Engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    stop = StopSignal()
    if disturb is not None:
        step_of_engine, updates = Engine.train_step, iter(range(1, 1000))

        def disturbed(self, *args, **kwargs):
            disturb(next(updates))
            return step_of_engine(self, *args, **kwargs)

        Engine.train_step = disturbed
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as warned:
        code = run(plan, detect_launch(), stop)
    return code, said.getvalue(), warned.getvalue()


def records(folder: Path, split: str = "train") -> list[dict]:
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def curve(folder: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in records(folder)]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())
