"""Kill a small run again and again, half of the time while it saves, and see that it ends as if it had not been."""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.parallel.local_ranks import RankFailedError, run_ranks
from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict

WORLD_SIZE = 4
SECONDS_OF_AN_ATTEMPT = 60.0


def small_plan(folder: Path, name: str, steps: int) -> Plan:
    """TP 2 x PP 2 in bf16 with dropout: weights, moments and random states must all be right to end alike."""
    run = {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 96,
            "vocab_size": 256,
            "max_position_embeddings": 32,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "data": {"prefix": str(folder / "data")},
        "training": {"steps": steps, "eval_batches": 1},
        "checkpoint": {"directory": str(folder / name), "save_interval": 2},
        "logging": {"directory": str(folder / f"{name}-logs"), "interval": 2},
    }
    config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    return make_plan(run_config_from_dict(run), deepspeed_config_from_dict(config), WORLD_SIZE)


def write_dataset(prefix: Path) -> None:
    """Documents of arithmetic sequences, which can be learnt."""
    import numpy as np

    from megagpt.data.indexed import IndexedWriter

    chooser = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=256) as writer:
        for _ in range(400):
            start, stride = chooser.integers(0, 256), chooser.integers(1, 5)
            writer.add((start + stride * np.arange(chooser.integers(40, 120))) % 256)


def train(plan: Plan, pids: Path) -> int:
    """One rank of the run, as the command trains; it leaves its process id for the killer."""
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    return run(plan, detect_launch(), StopSignal())


def kill_later(plan: Plan, pids: Path, during_save: bool, everyone: bool, seed: int) -> None:
    """Wait for the moment, then kill one rank or all of them."""
    chooser, deadline = random.Random(seed), time.monotonic() + SECONDS_OF_AN_ATTEMPT
    directory = Path(plan.run.checkpoint.directory or "")

    def wait_until(condition: Callable[[], Any]) -> None:
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)

    wait_until(lambda: len(list(pids.iterdir())) == WORLD_SIZE)
    if during_save:
        for _ in range(chooser.randint(1, 3)):
            wait_until(lambda: not list(directory.glob(".step-*.tmp")))
            wait_until(lambda: list(directory.glob(".step-*.tmp")))
        time.sleep(chooser.uniform(0, 0.06))
    else:
        time.sleep(chooser.uniform(0, 6))
    victims = range(WORLD_SIZE) if everyone else [chooser.randrange(WORLD_SIZE)]
    for rank in victims:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((pids / str(rank)).read_text()), signal.SIGKILL)


@contextlib.contextmanager
def killer(*arguments: Any) -> Iterator[None]:
    """Run `kill_later` in a process of its own meanwhile."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            kill_later(*arguments)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def losses(plan: Plan) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step."""
    lines = (Path(plan.run.logging.directory or "") / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def soak(kills: int, steps: int, seed: int, folder: Path) -> int:
    """Run once undisturbed, then with kills; 0 if both end alike."""
    from megagpt.checkpoint import CheckpointReader, find_checkpoint
    from megagpt.checkpoint.inspection import comparison

    write_dataset(folder / "data")
    calm, wild = small_plan(folder, "calm", steps), small_plan(folder, "wild", steps)
    directory = Path(wild.run.checkpoint.directory or "")
    pids = folder / "pids"
    pids.mkdir()
    started = time.monotonic()
    run_ranks(train, WORLD_SIZE, calm, pids, timeout=1800)
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s, final loss {losses(calm)[-1][1]!r}")
    chooser, done = random.Random(seed), Counter[str]()
    resumed_from: set[str] = set()
    while done["kills"] < kills:
        during_save, everyone = done["kills"] % 2 == 0, chooser.random() < 0.5
        for path in pids.iterdir():
            path.unlink()
        try:
            with killer(wild, pids, during_save, everyone, chooser.randrange(1 << 30)):
                run_ranks(train, WORLD_SIZE, wild, pids, timeout=SECONDS_OF_AN_ATTEMPT)
        except RankFailedError as error:
            if "killed or timed out" not in str(error):
                raise
            in_the_middle = bool(list(directory.glob(".step-*.tmp")))
            done["kills"] += 1
            done["of all ranks" if everyone else "of one rank"] += 1
            done["that left half a checkpoint behind"] += in_the_middle
            newest = (directory / "latest").read_text().strip() if (directory / "latest").exists() else "nothing"
            resumed_from.add(newest)
            print(
                f"kill {done['kills']}/{kills}: {'all ranks' if everyone else 'one rank'}"
                f"{', in the middle of a save' if in_the_middle else ''}; newest checkpoint: {newest}",
                flush=True,
            )
        else:
            print(f"the run was finished after {done['kills']} kills; give more --steps")
            break
    run_ranks(train, WORLD_SIZE, wild, pids, timeout=1800)
    same_losses = losses(wild) == losses(calm)
    finals = [CheckpointReader(find_checkpoint(Path(p.run.checkpoint.directory or ""))) for p in (wild, calm)]
    same_state, text = comparison(*finals)
    print(f"{', '.join(f'{count} {what}' for what, count in done.items())}; {len(resumed_from)} points of resumption")
    print(f"final loss {losses(wild)[-1][1]!r}; all {steps} losses and norms equal: {same_losses}")
    print(f"final checkpoints: {text.splitlines()[-1]}")
    damaged = list(directory.glob("damaged-*"))
    print(f"damaged checkpoints met: {len(damaged)}")
    return 0 if same_losses and same_state and done["kills"] >= kills and not damaged else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if losses and weights are the very same.", allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, half of them during saves (default: 100)")
    parser.add_argument("--steps", type=int, default=600, help="steps of the run (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")
    args = parser.parse_args()
    quiet_libraries(verbose=False)
    import torch

    torch.set_num_threads(1)
    from megagpt.parallel.console import muted
    from megagpt.parallel.without_cuda import prepare_deepspeed, support_hosts_without_cuda

    with muted(verbose=False):
        prepare_deepspeed()
        support_hosts_without_cuda()
        import megagpt.engine
        import megagpt.train  # noqa: F401
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        return soak(args.kills, args.steps, args.seed, Path(folder))


if __name__ == "__main__":
    run_command(main)
