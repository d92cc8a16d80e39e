"""Moves between layouts: a run saved on one goes on on another, and its curve is that of the run that never moved.

Each source trains, saves in the middle and goes on; each target restores every source's checkpoint in turn and trains
the second half. Where the precision changes, the bound is the coarser one's.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import inf, isfinite
from pathlib import Path
from typing import Any

from megagpt.parallel.local_ranks import run_ranks
from megagpt.plan import Plan
from megagpt.verify.layout import import_libraries
from megagpt.verify.small_plans import ADAM, small_plan

HALF, WHOLE = 3, 6
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Largest difference of a step's loss in nats per token, by the coarser of the precisions of source and target."""

Curve = list[float]


@dataclass(frozen=True)
class Side:
    """One end of a move: a layout and what else may change."""

    name: str
    layout: dict[str, Any] = field(default_factory=dict)

    def plan(self, model: str, directory: Path) -> Plan:
        """The small run of a model whose checkpoints are in `directory`."""
        sections = {"checkpoint": {"directory": str(directory), "asynchronous": False}, "training": {"steps": WHOLE}}
        layout = dict(self.layout)
        deepspeed: dict[str, Any] = {"train_micro_batch_size_per_gpu": layout.pop("micro", 2)}
        if layout.get("precision") == "fp16":
            deepspeed["fp16"] = {"initial_scale_power": 8}  # or the first updates would be skipped on one side only
        offload = layout.pop("offload", None)
        if offload:
            deepspeed["zero_optimization"] = {name: {"device": "cpu"} for name in offload}
        return small_plan(model, ADAM, steps=WHOLE, sections=sections, deepspeed=deepspeed, **layout)


@dataclass(frozen=True)
class Move:
    """What was found about one move."""

    model: str
    source: Side
    target: Side
    difference: float
    """Largest difference of a step's loss after the move, in nats per token."""
    bound: float
    seconds: float
    """To restore."""

    @property
    def passed(self) -> bool:
        """Whether the curve goes on."""
        return self.difference <= self.bound


SIDES = (
    Side("one process, micro-batch 4", {"micro": 4}),
    Side("TP 2 x PP 2", {"tp": 2, "pp": 2}),
    Side("TP 4, SP", {"tp": 4, "sp": True}),
    Side("PP 4, micro-batch 1", {"pp": 4, "micro": 1}),
    Side("PP 2 x DP 2", {"pp": 2, "dp": 2}),
    Side("TP 2 x DP 2, SP, ZeRO 2", {"tp": 2, "dp": 2, "sp": True, "zero": 2}),
    Side("DP 2, ZeRO 3", {"dp": 2, "zero": 3}),
    Side("TP 2 x DP 2, ZeRO 3", {"tp": 2, "dp": 2, "zero": 3}),
    Side("TP 2 x CP 2", {"tp": 2, "cp": 2}),
)
"""Every one of these is moved to every other one, in fp32."""
PRECISIONS = (
    Side("one process"),
    Side("bf16, TP 2 x PP 2", {"tp": 2, "pp": 2, "precision": "bf16"}),
    Side("bf16, DP 2, ZeRO 3", {"dp": 2, "zero": 3, "precision": "bf16"}),
    Side("fp16, TP 2 x DP 2, ZeRO 2", {"tp": 2, "dp": 2, "zero": 2, "precision": "fp16"}),
)
EXPERTS = (
    Side("one process"),
    Side("EP 2 x DP 2, ZeRO 2", {"ep": 2, "dp": 2, "zero": 2}),
    Side("EP 2 x DP 2 x PP 2", {"ep": 2, "dp": 2, "pp": 2}),
    Side("TP 2 x DP 2, SP, EP 2", {"tp": 2, "dp": 2, "sp": True, "ep": 2}),
)
TIED = (Side("TP 2 x PP 2", {"tp": 2, "pp": 2}), Side("one process"), Side("DP 2, ZeRO 3", {"dp": 2, "zero": 3}))
GROUPS: dict[str, tuple[str, tuple[Side, ...]]] = {
    "Layouts": ("llama", SIDES),
    "Precisions": ("llama", PRECISIONS),
    "Experts": ("mixtral", EXPERTS),
    "Tied embeddings, learned positions, biases": ("gpt2", TIED),
}


def measure_source(plan: Plan) -> Curve:
    """Train, save in the middle and go on: the losses of the second half."""
    return _run([plan], saves=True)[0][0]


def measure_target(plans: Sequence[Plan]) -> list[tuple[Curve, float]]:
    """Per plan (they differ in the checkpoints' directory) the losses after the restore, and its seconds."""
    return _run(plans, saves=False)


def _run(plans: Sequence[Plan], saves: bool) -> list[tuple[Curve, float]]:
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.data.loader import train_batches
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks
    from megagpt.verify.measure import sample_stream

    ranks = start_ranks(plans[0], detect_launch())
    engine = build_engine(plans[0], ranks)
    results = []
    for plan in plans:
        checkpoints = Checkpoints(plan, engine, ranks, Console(1))
        started = time.monotonic()
        state = TrainState() if saves else checkpoints.restore_latest()
        seconds = time.monotonic() - started
        assert state is not None, "the source has saved"
        batches = train_batches(
            sample_stream(plan),
            first_sample=state.samples,
            global_batch_size=plan.global_batch_size,
            microbatch_size=plan.microbatch_size,
            data_parallel_rank=ranks.data_rank,
            data_parallel_size=ranks.data_size,
        )
        losses = []
        while state.step < WHOLE:
            result = engine.train_step(batches, plan.run.optimizer.lr)
            state = state.advance(plan.global_batch_size, result.skipped)
            losses.append(float(result.loss))
            if saves and state.step == HALF:
                checkpoints.save(state, {})
        results.append((losses[-(WHOLE - HALF) :], seconds))
    return results


def measure_moves(
    groups: dict[str, tuple[str, tuple[Side, ...]]], told: Callable[[str], None] = print
) -> dict[str, list[Move]]:
    """Make every move between two different sides of each group.

    Args:
        groups: model and sides by title.
        told: takes lines of progress.
    """
    import_libraries()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (title, (model, sides)) in enumerate(groups.items()):
            directories = {side.name: Path(folder) / f"{index}-{place}" for place, side in enumerate(sides)}
            curves: dict[str, Curve] = {}
            for side in sides:
                plan = side.plan(model, directories[side.name])
                curves[side.name] = run_ranks(measure_source, plan.world_size, plan, timeout=600)[0]
                told(f"{title}: saved on {side.name}")
            found[title] = _measure_group(model, sides, directories, curves, told)
    return found


def _measure_group(
    model: str,
    sides: Sequence[Side],
    directories: dict[str, Path],
    curves: dict[str, Curve],
    told: Callable[[str], None],
) -> list[Move]:
    by_target: dict[tuple[str, str], tuple[Curve, float]] = {}
    for target in sides:
        plans = [target.plan(model, directories[source.name]) for source in sides]
        results = run_ranks(measure_target, plans[0].world_size, plans, timeout=1200)[0]
        by_target |= {(source.name, target.name): result for source, result in zip(sides, results, strict=True)}
        told(f"restored {len(sides)} checkpoints on {target.name}")
    moves = []
    for source in sides:
        for target in sides:
            if source is target:
                continue
            losses, seconds = by_target[source.name, target.name]
            bound = max(BOUNDS[side.layout.get("precision", "fp32")] for side in (source, target))
            differences = [abs(a - b) for a, b in zip(losses, curves[source.name], strict=True)]
            difference = max(differences) if all(map(isfinite, differences)) else inf
            moves.append(Move(model, source, target, difference, bound, seconds))
    return moves


INTRODUCTION = """\
# Moves of a run from one layout to another

Written by `python tools/verify_moves.py`; do not edit. It needs no GPU and about {minutes} minutes on two CPU cores.

Each run trains a small model for {half} steps with AdamW on real gloo processes, saves, and goes on for {rest} more.
Its checkpoint is then restored on every other layout, which trains those {rest} steps too. A cell holds the largest
difference of a step's loss, in nats per token, from the run that never moved: at most {bound:g} in fp32, {bf16:g} if
either side is bf16, {fp16:g} if either is fp16 and neither bf16. The global batch is 8; the micro-batch is 2 unless a
layout says otherwise.

Verdict: {verdict}. Versions: {versions}.
"""


def render(found: dict[str, list[Move]], minutes: float) -> str:
    """The document: a table of sources (rows) and targets (columns) per group.

    Args:
        found: moves by title.
        minutes: how long it took.
    """
    moves = [move for group in found.values() for move in group]
    passed = sum(move.passed for move in moves)
    names = ("torch", "deepspeed", "megatron-core")
    parts = [
        INTRODUCTION.format(
            minutes=max(round(minutes), 1),
            half=HALF,
            rest=WHOLE - HALF,
            bound=BOUNDS["fp32"],
            bf16=BOUNDS["bf16"],
            fp16=BOUNDS["fp16"],
            verdict=f"{passed} of {len(moves)} moves are within their bounds",
            versions=", ".join(f"{name} {version(name).split('+')[0]}" for name in names),
        )
    ]
    for title, group in found.items():
        sides = list(dict.fromkeys(move.source.name for move in group))
        cells = {(move.source.name, move.target.name): _cell(move) for move in group}
        lines = [f"| from \\ to | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
        lines += [f"| {one} | {' | '.join(cells.get((one, other), '') for other in sides)} |" for one in sides]
        parts.append("\n".join([f"## {title}", "", f"Model: `{group[0].model}`.", "", *lines, ""]))
    return "\n".join(parts)


def _cell(move: Move) -> str:
    return f"{move.difference:.0e}" if move.passed else f"**{move.difference:.0e}**"


def write_table(path: Path, groups: dict[str, tuple[str, tuple[Side, ...]]] = GROUPS) -> bool:
    """Make the moves and write the document; True if all are within their bounds."""
    started = time.monotonic()
    found = measure_moves(groups)
    text = render(found, (time.monotonic() - started) / 60)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    moves = [move for group in found.values() for move in group]
    missed = [move for move in moves if not move.passed]
    for move in missed:
        print(f"missed: {move.model}, {move.source.name} -> {move.target.name}: {move.difference:.1e} > {move.bound:g}")
    print(f"{path}: {len(moves) - len(missed)} of {len(moves)} moves are within their bounds")
    return not missed
