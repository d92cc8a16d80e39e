"""Found first by every Python of a drill: paces the steps of a run, and plants faults that no signal can bring about.

`DRILL_STEP_SECONDS` is how long a step takes at least, so that a fault from outside hits a tiny run in mid-course.
`DRILL_PLANT` is a fault, rank and step: `nan:2:9` spoils rank 2's gradients in step 9 once, `nan-stays:2:9` from step 9
on each time, `flip:3:9` turns a bit of a weight of rank 3 before step 9. A file beside the run config, `DRILL_MARK`,
keeps a fault that comes once from coming again after a restart. `DRILL_CLOCK` is a host and by how many seconds its
clock is fast.
"""

import importlib.abc
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

WATCHED = "megagpt.supervise.careful"


class Finder(importlib.abc.MetaPathFinder):
    """Changes one module once it is imported."""

    def find_spec(self, name, path, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            change(module.CarefulSteps)

        spec.loader.exec_module = load_and_change
        return spec


def change(steps_class) -> None:
    """Put what was asked for before each step."""
    pace = float(os.environ.get("DRILL_STEP_SECONDS", "0"))
    kind, rank, at = (os.environ.get("DRILL_PLANT") or "none:-1:-1").split(":")
    take = steps_class.take

    def slow_take(self, batches, learning_rate, step, first_sample):
        time.sleep(pace)
        is_due = step >= int(at) if kind.endswith("stays") else step == int(at)
        if is_due and self.ranks.rank == int(rank):
            plant(kind, self.engine)
        return take(self, batches, learning_rate, step, first_sample)

    steps_class.take = slow_take


def plant(kind: str, engine) -> None:
    """Do the harm."""
    import torch

    parameter = next(value for value in engine.parameters.values() if value.dim() == 2)
    if kind == "nan-stays":
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        return
    mark = Path(os.environ["DRILL_MARK"])
    if mark.exists():
        return
    mark.touch()
    if kind == "nan":
        left = [1]

        def spoil_once(gradient):
            spoiled = gradient * float("nan") if left else gradient
            left.clear()
            return spoiled

        parameter.register_hook(spoil_once)
    if kind == "flip":
        with torch.no_grad():
            parameter.view(torch.int32).view(-1)[3] ^= 1 << 22


def put_forward(seconds: float) -> None:
    """Put this process's clock forward."""
    right = time.time
    time.time = lambda: right() + seconds


clock_host, _, fast_by = os.environ.get("DRILL_CLOCK", "").partition(":")
if clock_host == socket.gethostname():
    put_forward(float(fast_by))
if os.environ.get("DRILL_STEP_SECONDS"):
    sys.meta_path.insert(0, Finder())
