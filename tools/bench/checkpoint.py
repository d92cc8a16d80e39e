"""How long training stands still for a save, beside torch.save in the loop; how long a restore takes, beside a read."""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.parallel.console import muted, quiet_libraries
from megagpt.parallel.launch import detect_launch, free_port
from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict

if TYPE_CHECKING:
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.engine import Engine

STALL_GOAL, RESTORE_GOAL = 0.2, 1.5
SIZES = {
    "smoke": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256},
    "67m": {"num_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 16384},
    "162m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 32000},
}
SEQUENCE = 128


def plan_of(size: str, directory: Path) -> Plan:
    """One process, fp32, AdamW: weights and two moments to save, 12 bytes per parameter."""
    run = {
        "model": {**SIZES[size], "max_position_embeddings": SEQUENCE},
        "training": {"steps": 1 << 20},
        "checkpoint": {"directory": str(directory), "keep_last": 1},
    }
    config = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    return make_plan(run_config_from_dict(run), deepspeed_config_from_dict(config), 1)


def start(plan: Plan) -> "tuple[Engine, Checkpoints]":
    """The engine and its checkpoints, as a run makes them."""
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    from megagpt.checkpoint import Checkpoints
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console

    engine = build_engine(plan, ranks)
    return engine, Checkpoints(plan, engine, ranks, Console(1))


def batches(plan: Plan) -> Iterator[Any]:
    """Random samples without end."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, plan.model.vocab_size, (1, plan.seq_length + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes, the device's work included."""
    import torch

    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def state_of(engine: "Engine") -> dict[str, Any]:
    """What both sides save: fp32 weights and moments."""
    fragments = engine.fragments()
    kinds: dict[str, Callable[[Any], Any]] = {"weight": lambda fragment: fragment.master}
    kinds |= {key: (lambda fragment, key=key: fragment.moment(key)) for key in ("exp_avg", "exp_avg_sq")}  # type: ignore[misc]
    return {f"{kind}/{fragment.name}": get(fragment) for kind, get in kinds.items() for fragment in fragments}


def save_with_torch(engine: "Engine", path: Path) -> None:
    """What a plain loop does: torch.save, then go on; not even waiting for the disk."""
    import torch

    # Parts of one flat tensor would each be saved with the whole of it.
    torch.save({name: tensor.clone() for name, tensor in state_of(engine).items()}, path)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Have the files read from the disk next time."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(folder: Path, memory: memoryview) -> None:
    """Read all files into memory that holds them, as a restore must, in pieces of 1 MiB."""
    begin = 0
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memory[begin : begin + (1 << 20)]):
                begin += count


def measure_saves(
    engine: "Engine", checkpoints: "Checkpoints", plan: Plan, state: "TrainState", rounds: int, scratch: Path
) -> dict[str, list[float]]:
    """Seconds of each round: the stall of a save, torch.save, a whole save, a step alone and beside a save."""
    found: dict[str, list[float]] = {name: [] for name in ("stall", "torch.save", "whole", "step", "step beside")}
    stream = batches(plan)
    checkpoints.on_saved = lambda saved: found["whole"].append(saved.seconds)
    for _ in range(rounds):
        found["step"].append(timed(lambda: engine.train_step(stream, 1e-4)))
        os.sync()
        found["stall"].append(timed(lambda: checkpoints.save(state, {})))
        found["step beside"].append(timed(lambda: engine.train_step(stream, 1e-4)))
        checkpoints.wait()
        os.sync()
        found["torch.save"].append(timed(lambda: save_with_torch(engine, scratch / "state.pt")))
    return found


def measure_restores(checkpoints: "Checkpoints", folder: Path, rounds: int, cold: bool) -> dict[str, list[float]]:
    """Seconds of each round: a restore, and reading the same files."""
    memory = memoryview(bytearray(sum(path.stat().st_size for path in files_of(folder)) + 1))
    found: dict[str, list[float]] = {"restore": [], "read": []}
    for _ in range(rounds):
        for name, action in (("read", lambda: read_bytes(folder, memory)), ("restore", checkpoints.restore_latest)):
            if cold:
                forget(folder)
            found[name].append(timed(action))
    return found


def ratio(found: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(found[ours], found[theirs], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Exit status: 1 if a goal is missed.")
    parser.add_argument("--size", choices=SIZES, default="67m", help="model (default: 67m, 0.8 GB of state)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--directory", type=Path, help="disk to write to (default: the system's temporary folder)")
    args = parser.parse_args()
    quiet_libraries(verbose=False)
    folder = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        return bench(plan_of(args.size, folder / "checkpoints"), args.rounds, folder)
    finally:
        shutil.rmtree(folder)


def bench(plan: Plan, rounds: int, folder: Path) -> int:
    """Measure both sides by turns and print the ratios; 1 if a goal is missed."""
    with muted(verbose=False):
        engine, checkpoints = start(plan)
    from megagpt.checkpoint import TrainState, list_checkpoints

    for _ in range(2):
        engine.train_step(batches(plan), 1e-4)
    state = TrainState(step=2, samples=2, updates=2)
    size = sum(tensor.nbytes for tensor in state_of(engine).values()) / 1e9
    print(f"{plan.num_parameters:,} parameters, {size:.2f} GB of weights and moments, medians of {rounds} rounds")
    first = timed(lambda: checkpoints.save(state, {}))
    checkpoints.wait()
    saves = measure_saves(engine, checkpoints, plan, state, rounds, folder)
    missed = []
    value = ratio(saves, "stall", "torch.save")
    median = {name: statistics.median(values) for name, values in saves.items()}
    print(
        f"save: training stands still {median['stall']:.3f} s (the first time {first:.3f} s), torch.save in the loop "
        f"{median['torch.save']:.3f} s: {value:.2f} x (goal: {STALL_GOAL})"
    )
    print(
        f"      it is whole and on the disk after {median['whole']:.2f} s; a step beside it takes "
        f"{ratio(saves, 'step beside', 'step'):.2f} x a step alone"
    )
    if value > STALL_GOAL:
        missed.append("save")
    checkpoint = Path(str(list_checkpoints(folder / "checkpoints")[0]))
    for name, cold in (("disk", True), ("page cache", False)):
        with contextlib.redirect_stdout(None):
            restores = measure_restores(checkpoints, checkpoint, rounds, cold)
        value = ratio(restores, "restore", "read")
        print(
            f"restore from {name}: {statistics.median(restores['restore']):.3f} s, reading the bytes "
            f"{statistics.median(restores['read']):.3f} s: {value:.2f} x (goal: {RESTORE_GOAL})"
        )
        if value > RESTORE_GOAL:
            missed.append(f"restore from {name}")
    checkpoints.close()
    print(f"missed: {', '.join(missed)}" if missed else "all goals met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
