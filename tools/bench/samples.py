"""Time to the first sample, memory, cache files and time per read, beside Megatron-Core's GPTDataset.

The dataset has 20 million documents of 100 tokens and a manifest, as tools/preprocess_data.py writes it: its index is
real, its tokens are a sparse file, so that the disk holds none of them. Each side runs in its own process, which first
imports its libraries; CPU seconds and memory are counted from there on. Megatron-Core builds index files in a fresh
folder; megagpt has none. Samples are read twice, and the second time counts.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megagpt.data.indexed import IndexedWriter, bin_path
from megagpt.data.manifest import FORMAT, Manifest, write_manifest
from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries

SEQ_LENGTH = 2048
VOCABULARY = 32000
READS = 2000
GOALS = {  # case: (how much sooner the first sample must be there, most microseconds per read)
    "1 epoch": (50.0, 15.0),
    "10 epochs": (500.0, 15.0),
    "20 datasets": (0.0, 15.0),
}
INDEX_GOAL_SECONDS = 1.5
MEMORY_GOAL_MB = 20


@dataclass(frozen=True)
class Cost:
    """What a side took, from behind its imports on."""

    first_sample_s: float
    """CPU seconds until the first sample is there."""
    cache_mb: float
    """Size of the index files that it wrote."""
    memory_mb: float
    """Growth of its peak memory until the first sample."""
    read_us: float
    """CPU microseconds per read of a sample, after the first."""
    tokens_per_read: int


def write_dataset(prefix: Path, num_documents: int, tokens_per_document: int) -> float:
    """Write the index, and a sparse file for the tokens (all 0).

    Returns:
        CPU seconds for the index.
    """
    writer = IndexedWriter(prefix, VOCABULARY)
    started = time.process_time()
    writer.add_lengths(np.full(num_documents, tokens_per_document, dtype=np.int32))
    writer.num_tokens = num_documents * tokens_per_document
    writer.close()
    seconds = time.process_time() - started
    with bin_path(prefix).open("r+b") as file:
        file.truncate(2 * num_documents * tokens_per_document)
    write_manifest(
        prefix,
        Manifest(
            format=FORMAT,
            megagpt_version="bench",
            tokenizer_file="none",
            tokenizer_sha256="0" * 64,
            vocab_size=VOCABULARY,
            dtype="uint16",
            text_key="text",
            append_eod=True,
            min_length=1,
            seed=None,
            on_bad_line="error",
            num_documents=num_documents,
            num_tokens=num_documents * tokens_per_document,
            skipped_short=0,
            skipped_bad=0,
            bin_sha256="0" * 64,
            idx_sha256=writer.idx_sha256,
            inputs=(),
        ),
    )
    return seconds


def peak_mb() -> float:
    """Peak resident memory of this process; unlike that of getrusage, not of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def measure(open_reader, numbers: list[int], cache: Path | None = None) -> Cost:
    """Cost of a reader, as it reads samples by `numbers`: `open_reader()` gives a function from a number to tokens."""
    memory, started = peak_mb(), cpu_seconds()
    read = open_reader()
    first = read(0)
    first_sample = cpu_seconds() - started
    memory = peak_mb() - memory
    for number in numbers:  # from here on the operating system has them in memory
        read(number)
    started = cpu_seconds()
    for number in numbers:
        read(number)
    cost = (cpu_seconds() - started) / len(numbers)
    written = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache else 0
    return Cost(first_sample, written / 1e6, memory, 1e6 * cost, len(first))


def random_numbers(samples: int) -> list[int]:
    """Samples that are read."""
    return np.random.default_rng(0).integers(0, samples, READS).tolist()


def megagpt_side(prefixes: list[str], samples: int, _: str) -> Cost:
    """This project: a stream over one dataset, or a mixture of several."""
    from megagpt.data.run_data import open_data
    from megagpt.plan.data_config import DataConfig, DatasetConfig

    def open_reader():
        if len(prefixes) == 1:
            config = DataConfig(prefix=prefixes[0], split=(1.0, 0.0, 0.0))
        else:
            entries = tuple(DatasetConfig(prefix=prefix, weight=float(i + 1)) for i, prefix in enumerate(prefixes))
            config = DataConfig(datasets=entries, split=(1.0, 0.0, 0.0))
        return open_data(config, VOCABULARY, SEQ_LENGTH, seed=1234).train.sample

    # A mixture is read in the order of a run, and over so many samples that none of its blocks is still there.
    numbers = random_numbers(samples) if len(prefixes) == 1 else list(range(12 * READS))
    return measure(open_reader, numbers)


def megatron_side(prefixes: list[str], samples: int, cache: str) -> Cost:
    """Megatron-Core's GPTDataset or BlendedDataset."""
    quiet_libraries(verbose=False)
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import compile_helpers

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{cache}.rendezvous", rank=0, world_size=1)
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:  # some wheels hold it compiled
        compile_helpers()

    class Tokenizer:
        """What GPTDataset asks of a tokenizer."""

        eod = 1
        unique_identifiers = {"class": "bench"}
        vocab_size = VOCABULARY

    def open_reader():
        weights = None if len(prefixes) == 1 else [float(i + 1) for i in range(len(prefixes))]
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=SEQ_LENGTH,
            blend=(prefixes, weights),
            split="1,0,0",
            path_to_cache=cache,
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
        return lambda number: train[number]["tokens"]

    return measure(open_reader, random_numbers(samples), Path(cache))


SIDES = {"megagpt": megagpt_side, "Megatron-Core": megatron_side}


def _child(side: str, arguments: tuple, output: str) -> None:
    Path(output).write_text(json.dumps(asdict(SIDES[side](*arguments))))


def run_side(side: str, prefixes: list[str], samples: int, folder: Path) -> Cost:
    """Run a side in a fresh process.

    Raises:
        RuntimeError: it fails.
    """
    output = folder / f"{side}.json"
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        arguments = (side, (prefixes, samples, f"{cache}/index"), str(output))
        process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
        process.start()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{side} failed with status {process.exitcode}")
    return Cost(**json.loads(output.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--document-tokens", type=int, default=100)
    parser.add_argument("--cases", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    args = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = write_dataset(folder / "data", args.documents, args.document_tokens)
        print(f"index of {args.documents:,} documents written in {seconds:.2f} CPU s (goal {INDEX_GOAL_SECONDS})")
        if seconds > INDEX_GOAL_SECONDS:
            missed.append(f"index written in {seconds:.2f} CPU s, the goal is {INDEX_GOAL_SECONDS}")
        epoch = args.documents * args.document_tokens // SEQ_LENGTH
        parts = []
        for i in range(20):
            write_dataset(folder / f"part{i}", args.documents // 20, args.document_tokens)
            parts.append(str(folder / f"part{i}"))
        cases = {
            "1 epoch": ([str(folder / "data")], epoch),
            "10 epochs": ([str(folder / "data")], 10 * epoch),
            "20 datasets": (parts, epoch),
        }
        table = Table(
            title=f"{args.documents:,} documents, {epoch * SEQ_LENGTH / 1e9:.2f} B tokens, sequence {SEQ_LENGTH}"
        )
        for column in ("case", "side", "first sample, CPU s", "sooner", "cache MB", "memory MB", "us per read"):
            table.add_column(column, justify="left" if column in ("case", "side") else "right")
        for case in args.cases:
            costs = {side: run_side(side, *cases[case], folder) for side in args.sides}
            missed += rows(table, case, costs)
    Console(width=120).print(table)
    for line in missed:
        print(f"missed: {line}")
    if not missed:
        print("all goals reached")
    return int(bool(missed))


def rows(table: Table, case: str, costs: dict[str, Cost]) -> list[str]:
    """Add a case to the table; returns the goals that it misses."""
    ours, theirs = costs.get("megagpt"), costs.get("Megatron-Core")
    sooner = theirs.first_sample_s / max(ours.first_sample_s, 1e-4) if ours and theirs else None
    for side, cost in costs.items():
        ratio = f"{sooner:,.0f} x" if sooner is not None and side == "megagpt" else ""
        figures = [f"{cost.first_sample_s:.4f}", ratio, f"{cost.cache_mb:,.0f}", f"{cost.memory_mb:,.0f}"]
        table.add_row(case, side, *figures, f"{cost.read_us:.1f}")
    wanted, most = GOALS[case]
    missed = []
    if sooner is not None and sooner < wanted:
        missed.append(f"{case}: first sample {sooner:.0f} x sooner, the goal is {wanted:.0f}")
    if ours and ours.cache_mb:
        missed.append(f"{case}: {ours.cache_mb:.0f} MB of cache files, the goal is none")
    if ours and ours.memory_mb > MEMORY_GOAL_MB:
        missed.append(f"{case}: {ours.memory_mb:.0f} MB more memory, the goal is {MEMORY_GOAL_MB}, whatever the epochs")
    if ours and ours.read_us > most:
        missed.append(f"{case}: {ours.read_us:.1f} us per read, the goal is {most:.0f}")
    return missed


if __name__ == "__main__":
    sys.exit(run_command(main))
