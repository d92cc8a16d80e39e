"""CPU and wall-clock seconds from starting Python to the end of a first step on one rank, and of what needs no step.

megagpt's side is the real command, `python -m megagpt.train`, on a tiny dataset: plan, data, watchdog and all. The
naive side is the script that one writes with the same libraries: import torch, transformers (for the tokenizer),
DeepSpeed and GPTModel, build the same model, take one step on random tokens. Both are short of work, so that what is
measured is starting. Sides take turns; of several turns the first, which fills the disk cache, is not counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megagpt.errors import MegagptError, run_command

GOAL = 0.5
"""Of the naive script's CPU seconds."""
ROOT = Path(__file__).resolve().parents[2]
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 176, "vocab_size": 300}
SEQUENCE = 64


class BenchError(MegagptError):
    """A side has failed."""


def naive() -> None:
    """The naive script; runs in a process of its own."""
    # What no script can do without on a host without CUDA; on others it does nothing.
    from megagpt.parallel.without_cuda import prepare_deepspeed, support_hosts_without_cuda

    prepare_deepspeed()
    support_hosts_without_cuda()
    import deepspeed
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from transformers import AutoTokenizer  # noqa: F401

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=MODEL["num_layers"],
        hidden_size=MODEL["hidden_size"],
        num_attention_heads=MODEL["num_attention_heads"],
        ffn_hidden_size=MODEL["ffn_hidden_size"],
        use_cpu_initialization=True,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), MODEL["vocab_size"], SEQUENCE)
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={"train_batch_size": 2, "zero_optimization": {"stage": 1}},
        dist_init_required=False,
    )
    device = wrapped.device
    tokens = torch.randint(0, MODEL["vocab_size"], (2, SEQUENCE + 1), device=device)
    positions = torch.arange(SEQUENCE, device=device).expand(2, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)
    loss = wrapped(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
    wrapped.backward(loss)
    wrapped.step()
    torch.distributed.destroy_process_group()


def write_run(folder: Path) -> list[str]:
    """A dataset, a run config and a DeepSpeed config in `folder`; returns the arguments of the training command."""
    from megagpt.data.preprocess import preprocess
    from megagpt.data.tokenizer import train_sentencepiece

    texts = [f"The value of step {i} is {i * i}, and that of the next one {(i + 1) ** 2}." for i in range(500)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_sentencepiece(texts, folder / "tokenizer", vocab_size=MODEL["vocab_size"])
    preprocess([folder / "corpus.jsonl"], folder / "data", folder / "tokenizer.model")
    run = {
        "model": MODEL | {"max_position_embeddings": SEQUENCE},
        "data": {"prefix": str(folder / "data"), "tokenizer": str(folder / "tokenizer.model")},
        "training": {"steps": 1, "seq_length": SEQUENCE, "eval_interval": 0},
        "logging": {"directory": str(folder / "logs")},
    }
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    (folder / "ds.json").write_text(json.dumps({"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2}))
    return ["--config", str(folder / "run.yaml"), "--deepspeed_config", str(folder / "ds.json")]


def timed(command: list[str]) -> tuple[float, float]:
    """CPU seconds (of all its processes) and wall-clock seconds of a command.

    Raises:
        BenchError: it fails.
    """
    from megagpt.parallel.launch import free_port

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    rank = dict(zip(names, ("0", "1", "0", "127.0.0.1"), strict=True)) | {"MASTER_PORT": str(free_port())}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | rank, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> int:
    """Measure; exit status 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each command; default 5")
    parser.add_argument("--naive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.naive:
        naive()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        python = sys.executable
        commands = {
            "naive script, one step": [python, "-W", "ignore", __file__, "--naive"],
            "megagpt.train, one step": [python, "-m", "megagpt.train", *run],
            "import torch": [python, "-c", "import torch"],
            "tools/plan.py": [python, "tools/plan.py", *run, "--world-size", "1"],
            "megagpt.train --help": [python, "-m", "megagpt.train", "--help"],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(args.rounds):
            for name, command in commands.items():
                seconds = timed(command)
                if turn > 0 or args.rounds == 1:
                    found[name].append(seconds)
    return report(Console(highlight=False), found)


def report(console: Console, found: dict[str, list[tuple[float, float]]]) -> int:
    """Print the medians; returns the exit status."""
    table = Table("command")
    for column in ("CPU s", "of the naive script's", "wall s"):
        table.add_column(column, justify="right")
    medians = {
        name: [statistics.median(values) for values in zip(*turns, strict=True)] for name, turns in found.items()
    }
    reference = next(iter(medians.values()))[0]
    for name, (cpu, wall) in medians.items():
        table.add_row(name, f"{cpu:.2f}", f"{cpu / reference:.2f} x", f"{wall:.2f}")
    console.print(table)
    ratio = medians["megagpt.train, one step"][0] / reference
    console.print(f"{'goal met' if ratio <= GOAL else 'missed'}: {ratio:.2f} x the naive script, the goal is {GOAL}")
    return int(ratio > GOAL)


if __name__ == "__main__":
    run_command(main)
