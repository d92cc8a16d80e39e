"""The whole path on this machine: text -> tokenizer -> dataset -> training -> Hugging Face folder -> generated text.

`make quickstart` runs it. Every phase is a command that you can run by yourself; it is printed before it starts. What
is already there is kept, so an interrupted quickstart goes on where it stopped; --fresh begins again.
"""

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megagpt.errors import MegagptError, run_command
from megagpt.parallel.launch import free_port
from megagpt.plan import load_run_config

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_PORT = 29500  # the deepspeed launcher's default
PROMPTS = ("Returns the number of", "This function takes", "Raised when a")


class QuickstartError(MegagptError):
    """A phase failed; its own output says why."""


@dataclass
class Quickstart:
    """Folder, number of ranks and what has been measured so far."""

    folder: Path
    overrides: list[str]
    ranks: int
    console: Console = field(default_factory=lambda: Console(highlight=False))
    seconds: dict[str, float] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)

    def tool(self, name: str, *arguments: str | Path) -> list[str]:
        """Command line of one of our tools."""
        return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]

    def phase(self, title: str, action: Callable[[], object], made: Path | None = None) -> None:
        """Run and time one phase, unless what it makes is there."""
        if made is not None and made.exists():
            self.console.print(f"\n[bold]{title}[/bold]: kept {made}")
            return
        self.console.print(f"\n[bold]{title}[/bold]")
        started = time.monotonic()
        action()
        self.seconds[title] = time.monotonic() - started

    def command(self, arguments: Sequence[str], keep_as: str | None = None) -> None:
        """Show and run a command; with `keep_as` its output is printed and kept under that name."""
        shown = [Path(arguments[0]).name if Path(arguments[0]).is_absolute() else arguments[0]]
        shown += [os.path.relpath(a) if Path(a).is_absolute() and Path(a).exists() else a for a in arguments[1:]]
        self.console.print(f"[dim]$ {escape(' '.join(quoted(a) for a in shown))}[/dim]", soft_wrap=True)
        result = subprocess.run(
            arguments, env=rank_environment(self.ranks), text=True, stdout=None if keep_as is None else subprocess.PIPE
        )
        if keep_as is not None:
            self.printed[keep_as] = result.stdout.strip()
            print(result.stdout.rstrip(), flush=True)
        if result.returncode:
            raise QuickstartError(
                f"the command above failed with status {result.returncode}; mend it and run the quickstart again"
            )


def quoted(argument: str) -> str:
    """An argument as one would type it."""
    return f'"{argument}"' if " " in argument else argument


def rank_environment(ranks: int) -> dict[str, str]:
    """Share the processor's cores between the ranks, and tell DeepSpeed's launcher where it is."""
    environment = dict(os.environ)
    if num_gpus() == 0:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def num_gpus() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def master_port() -> list[str]:
    """An option for the launcher if its default port is taken by another job of this machine."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", LAUNCHER_PORT)):
            return []
    return ["--master_port", str(free_port())]


def layout(gpus: int) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size: 2 x 2 on CPU ranks or four GPUs, less on fewer GPUs."""
    if gpus in (1, 2, 3):
        return min(gpus, 2), 1
    return 2, 2


def changes(config: Path, folder: Path, tensor: int, pipeline: int) -> list[str]:
    """Overrides that turn the run config into this quickstart's; none for those that it has already."""
    run = load_run_config(config)
    wanted: list[tuple[str, object, object]] = [
        ("parallel.tensor_model_parallel_size", run.parallel.tensor_model_parallel_size, tensor),
        ("parallel.pipeline_model_parallel_size", run.parallel.pipeline_model_parallel_size, pipeline),
        ("data.prefix", run.data.prefix, str(folder / "dataset")),
        ("data.tokenizer", run.data.tokenizer, str(folder / "tokenizer.model")),
        ("checkpoint.directory", run.checkpoint.directory, str(folder / "checkpoints")),
        ("logging.directory", run.logging.directory, str(folder)),
    ]
    return [f"{key}={value}" for key, current, value in wanted if current != value]


def baselines(prefix: Path, config_path: Path, overrides: list[str], global_batch_size: int) -> dict[str, float]:
    """Unigram and bigram perplexity of the very tokens that the model is evaluated on."""
    from megagpt.data.indexed import IndexedDataset
    from megagpt.data.loader import num_eval_batches
    from megagpt.data.ngram import bigram_perplexity, unigram_perplexity
    from megagpt.data.run_data import open_data
    from megagpt.data.samples import split_ranges

    run = load_run_config(config_path, overrides)
    dataset = IndexedDataset(str(prefix))
    ranges = split_ranges(dataset.num_documents, dataset.document_start, run.data.split)
    length = run.training.seq_length
    (validation,) = open_data(run.data, run.model.vocab_size, length, run.training.seed).validation
    samples = num_eval_batches(validation.stream, run.training.eval_batches, global_batch_size) * global_batch_size
    train = dataset.tokens(*ranges["train"])
    start = ranges["validation"][0]
    test = dataset.tokens(start, start + samples * length + 1)
    size = run.model.vocab_size
    return {"unigram": unigram_perplexity(train, test, size), "bigram": bigram_perplexity(train, test, size)}


def validation_perplexities(metrics: Path) -> list[float]:
    """Validation perplexity at each evaluation of the run, in order."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [math.exp(record["loss"]) for record in records if record["split"] == "validation"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train, export and try a small GPT on this machine, from text to generated text."
    )
    parser.add_argument("--work-dir", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--config", type=Path, default=ROOT / "tools" / "quickstart.yaml", help="run config (YAML)")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs" / "quickstart.json")
    parser.add_argument("--max-mb", type=float, default=30.0, help="most megabytes of text to collect")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart has left in --work-dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    args = parser.parse_args()
    if args.fresh and args.work_dir.exists():
        shutil.rmtree(args.work_dir)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    tensor, pipeline = layout(num_gpus())
    folder = args.work_dir
    overrides = [*changes(args.config, folder, tensor, pipeline), *args.overrides]
    quickstart = Quickstart(folder, overrides, ranks=tensor * pipeline)
    run_phases(quickstart, args)
    global_batch_size = json.loads(args.deepspeed_config.read_text())["train_batch_size"]
    ngrams = baselines(folder / "dataset", args.config, overrides, global_batch_size)
    summary(quickstart, ngrams)


def run_phases(quickstart: Quickstart, args: argparse.Namespace) -> None:
    """All phases in order."""
    q, folder = quickstart, quickstart.folder
    corpus, tokenizer, export = folder / "corpus.jsonl", folder / "tokenizer.model", folder / "hf"
    vocab_size = str(load_run_config(args.config, q.overrides).model.vocab_size)
    common = ["--config", str(args.config), "--deepspeed_config", str(args.deepspeed_config)]
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--quiet",
        "--num_gpus",
        str(q.ranks),
        *master_port(),
        "--module",
        "megagpt.train",
    ]
    q.phase(
        "Collect text",
        lambda: q.command(q.tool("collect_docs.py", "--output", corpus, "--max-mb", f"{args.max_mb:g}")),
        corpus,
    )
    train_tokenizer = q.tool(
        "train_tokenizer.py",
        "--input",
        corpus,
        "--output-prefix",
        tokenizer.with_suffix(""),
        "--vocab-size",
        vocab_size,
    )
    q.phase("Train tokenizer", lambda: q.command(train_tokenizer), tokenizer)
    preprocess = q.tool(
        "preprocess_data.py",
        "--input",
        corpus,
        "--output-prefix",
        folder / "dataset",
        "--tokenizer",
        tokenizer,
        "--append-eod",
        "--workers",
        "2",
    )
    q.phase("Build dataset", lambda: q.command(preprocess), folder / "dataset.json")
    q.phase("Plan", lambda: q.command(q.tool("plan.py", *common, "--world-size", str(q.ranks), *q.overrides)))
    q.phase("Train", lambda: q.command([*launcher, *common, *q.overrides]))
    convert = q.tool("convert_to_hf.py", "--checkpoint", folder / "checkpoints", "--output", export, "--overwrite")
    q.phase("Export to Hugging Face and check", lambda: q.command(convert, keep_as="export"))

    sampling = ["--max-new-tokens", "60", "--temperature", "0.7", "--top-k", "40"]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    q.phase(
        "Generate",
        lambda: q.command(q.tool("generate.py", "--checkpoint", folder / "checkpoints", *sampling, *prompts)),
    )


def summary(quickstart: Quickstart, ngrams: dict[str, float]) -> None:
    """The table at the end."""
    q, folder = quickstart, quickstart.folder
    phases = [(title, f"{seconds:.1f} s") for title, seconds in q.seconds.items()]
    curve = validation_perplexities(folder / "metrics.jsonl")
    quality = [
        ("model before training", f"{curve[0]:,.1f}"),
        ("unigram", f"{ngrams['unigram']:,.1f}"),
        ("bigram", f"{ngrams['bigram']:,.1f}"),
        ("model after training", f"{curve[-1]:,.1f}"),
    ]
    places = [
        ("corpus.jsonl", "text, one document a line"),
        ("tokenizer.model", "tokenizer"),
        ("dataset.{bin,idx,json}", "tokens, index, manifest"),
        ("checkpoints/", "the run's checkpoints"),
        ("metrics.jsonl", "loss of every step (also as TensorBoard files)"),
        ("hf/", "the model for transformers; " + logits_difference(q.printed.get("export", ""))),
    ]
    show(q.console, "Time", [*phases, ("all", f"{sum(q.seconds.values()):.1f} s")], justify="right")
    show(q.console, "Perplexity of the same held-out tokens", quality, justify="right")
    show(q.console, f"Where things lie in {folder}", places)
    q.console.print("\n[bold]Next[/bold]")
    for command in (
        f'python tools/generate.py --checkpoint {folder}/checkpoints --prompt "Returns a new" --temperature 0.7',
        f"tensorboard --logdir {folder}",
        "python tools/plan.py --config tools/quickstart.yaml --deepspeed_config ds_configs/zero1_bf16.json"
        " --world-size 64 model.preset=llama3-8b",
        "README.md: your own text, several nodes, Slurm",
    ):
        q.console.print(f"  {escape(command)}", soft_wrap=True)


def show(console: Console, title: str, rows: list[tuple[str, str]], justify: Literal["left", "right"] = "left") -> None:
    """Print a table of two columns; the last row of figures is the one to look at."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify=justify)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if justify == "right" and number == len(rows) - 1 else None)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def logits_difference(printed: str) -> str:
    """The largest difference that the export's check has printed."""
    for line in printed.splitlines():
        if line.startswith("logits against the checkpoint's model"):
            return "logits: " + line.partition(":")[2].partition("(")[0].strip()
    return "logits checked"


if __name__ == "__main__":
    run_command(main)
