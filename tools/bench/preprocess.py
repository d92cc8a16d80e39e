"""MB and tokens per CPU-second of preprocessing: megagpt, Megatron-LM, and the bare loop around the tokenizer library.

All sides tokenise the same corpus with the same tokenizer, each in its own process with one worker, and take turns.
CPU seconds are user and system time of the process and its children from start to end, imports included; figures are
medians, ratios are medians over turns. Memory is the peak of the largest process. The files are compared byte by byte.
Memory is measured on a file of four times the size too, and on a single line. Megatron-LM is not part of megagpt: give
the folder of a clone with --megatron-lm, and, as it does not import without triton, a Python that has it with
--megatron-python. Without --corpus the text is Python source code found on this machine. Exit status 1: a goal is
missed.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megagpt.errors import DataError, run_command

ROOT = Path(__file__).resolve().parents[2]
MEGATRON, OURS, FAST = "Megatron-LM", "megagpt, reference", "megagpt, auto"
LEAST_X_MEGATRON = {OURS: 1.9, FAST: 25.0}
LEAST_X_BARE, LEAST_FAST_MB_PER_CPU_S, MOST_MB_ABOVE_IMPORTS = 0.95, 40.0, 300.0
LIBRARIES = {"huggingface": "tokenizers, gigatoken", "sentencepiece": "sentencepiece"}
END = "<|endoftext|>"
_DOCUMENT_CHARACTERS = 3300

# The least that has to be done: read JSON, encode batches, write the tokens.
BARE = """
import itertools, sys
import numpy, orjson
kind, corpus, tokenizer, output = sys.argv[1:]
if kind == "gigatoken":
    import gigatoken
    one = gigatoken.Tokenizer(tokenizer + "/tokenizer.json").backend.encode
    encode, eod = (lambda texts: [one(text) for text in texts]), 0
elif kind == "huggingface":
    import tokenizers
    loaded = tokenizers.Tokenizer.from_file(tokenizer + "/tokenizer.json")
    encode, eod = (lambda texts: [e.ids for e in loaded.encode_batch_fast(texts, add_special_tokens=False)]), 0
else:
    import sentencepiece
    loaded = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    encode, eod = (lambda texts: loaded.encode(texts, num_threads=1)), loaded.eos_id()
with open(corpus, "rb") as lines, open(output, "wb") as out:
    while batch := [orjson.loads(line)["text"] for line in itertools.islice(lines, 256)]:
        for ids in encode(batch):
            out.write(numpy.asarray(ids, dtype=numpy.uint16).tobytes())
            out.write(numpy.uint16(eod).tobytes())
"""


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu_seconds: float
    wall_seconds: float
    peak_mb: float


def measure(command: list[str], log: Path, **environ: str) -> Cost:
    """Run a command.

    Raises:
        DataError: it fails.
    """
    started = time.monotonic()
    with log.open("wb") as file:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **environ}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise DataError(f"{' '.join(command[:4])} ... failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024)


def write_corpus(path: Path, megabytes: int) -> None:
    """Documents of some thousand characters of Python source code of this installation, as JSONL."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in _sources():
            for at in range(0, len(text), _DOCUMENT_CHARACTERS):
                line = json.dumps({"text": text[at : at + _DOCUMENT_CHARACTERS]}, ensure_ascii=False) + "\n"
                size += file.write(line)
            if size > megabytes * 1e6:
                return


def _sources() -> Iterator[str]:
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def tokenizer_paths(folder: Path) -> dict[str, Path]:
    """Where the tokenizer of each kind is."""
    return {"huggingface": folder / "hf", "sentencepiece": folder / "sp.model"}


def train_tokenizers(corpus: Path, folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE (tokenizer.json) and a sentencepiece BPE on the first documents, unless they are there."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megagpt.data.documents import iter_texts
    from megagpt.data.tokenizer import train_sentencepiece

    made = tokenizer_paths(folder)
    texts = list(islice(iter_texts([str(corpus)]), 2500))
    if not made["sentencepiece"].exists():
        train_sentencepiece(texts, folder / "sp", vocab_size)
    if not made["huggingface"].exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
            ),
        )
        made["huggingface"].mkdir()
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        (made["huggingface"] / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer.save(str(made["huggingface"] / "tokenizer.json"))


@dataclass
class Goals:
    """Says of each goal whether it was reached."""

    missed: int = 0
    lines: list[str] = field(default_factory=list)

    def at_least(self, what: str, value: float, goal: float, unit: str) -> None:
        """A figure that should be large."""
        self._add(value >= goal, f"{what}: {value:.2f} {unit} (goal: at least {goal:g})")

    def at_most(self, what: str, value: float, goal: float, unit: str) -> None:
        """A figure that should be small."""
        self._add(value <= goal, f"{what}: {value:.0f} {unit} (goal: at most {goal:g})")

    def the_same(self, what: str, same: bool) -> None:
        """Files that should be the same."""
        self._add(same, f"{what}: the files are {'the same' if same else 'DIFFERENT'}")

    def _add(self, reached: bool, line: str) -> None:
        self.missed += not reached
        self.lines.append(f"{'reached' if reached else 'MISSED '}  {line}")


class Bench:
    """One corpus and one tokenizer; the sides are run by turns."""

    def __init__(self, kind: str, tokenizer: Path, corpus: Path, folder: Path):
        self.kind, self.tokenizer, self.corpus, self.folder = kind, tokenizer, corpus, folder
        self.costs: dict[str, list[Cost]] = {}
        self.files: dict[str, tuple[Path, Path | None]] = {}
        self._log = folder / "log"

    def run_megagpt(self, backend: str, workers: int = 1, corpus: Path | None = None) -> Cost:
        """The command as a user gives it."""
        name = f"megagpt, {backend}" + (f", {workers} workers" if workers > 1 else "")
        prefix = self.folder / (f"ours-{backend}-{workers}" if corpus is None else "ours-other")
        for old in (f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"):  # a complete dataset would be left alone
            Path(old).unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus or self.corpus)]
        command += ["--output-prefix", str(prefix), "--tokenizer", str(self.tokenizer), "--append-eod"]
        command += ["--backend", backend, "--workers", str(workers)]
        cost = measure(command, self._log, PYTHONPATH=str(ROOT))
        if corpus is None:
            self.costs.setdefault(name, []).append(cost)
            self.files[name] = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        return cost

    def run_bare(self, kind: str) -> None:
        """The loop around the library."""
        name, output = f"bare loop, {kind}", self.folder / f"bare-{kind}.bin"
        command = [sys.executable, "-c", BARE, kind, str(self.corpus), str(self.tokenizer), str(output)]
        self.costs.setdefault(name, []).append(measure(command, self._log))
        self.files[name] = output, None

    def run_megatron(self, clone: Path, python: str) -> None:
        """Megatron-LM's tools/preprocess_data.py."""
        kind = "HuggingFaceTokenizer" if self.kind == "huggingface" else "GPTSentencePieceTokenizer"
        prefix = self.folder / "megatron"
        command = [python, str(clone / "tools" / "preprocess_data.py"), "--input", str(self.corpus)]
        command += ["--output-prefix", str(prefix), "--tokenizer-type", kind, "--tokenizer-model", str(self.tokenizer)]
        command += ["--append-eod", "--workers", "1"]
        self.costs.setdefault(MEGATRON, []).append(measure(command, self._log, PYTHONPATH=str(clone)))
        self.files[MEGATRON] = Path(f"{prefix}_text_document.bin"), Path(f"{prefix}_text_document.idx")

    def imports_mb(self) -> float:
        """Peak memory of a process that only imports what the tool needs."""
        command = [sys.executable, "-c", f"import megagpt.data.preprocess, {LIBRARIES[self.kind]}"]
        return measure(command, self._log, PYTHONPATH=str(ROOT)).peak_mb

    def ratio(self, other: str, name: str) -> float | None:
        """How many times the CPU seconds of `name` another side needs; None if it was not run."""
        if other not in self.costs:
            return None
        pairs = zip(self.costs[other], self.costs[name], strict=False)
        return statistics.median(theirs.cpu_seconds / ours.cpu_seconds for theirs, ours in pairs)

    def table(self) -> Table:
        """Figures of all sides, with the ratio to Megatron-LM and to the bare loop of the reference library."""
        megabytes = self.corpus.stat().st_size / 1e6
        tokens = self.files[OURS][0].stat().st_size / 2
        table = Table(title=f"{self.kind}: {megabytes:.1f} MB of JSONL, {tokens / 1e6:.1f} M tokens")
        names = ("CPU s", "MB/CPU s", "M tokens/CPU s", "wall s", "peak MB", "x Megatron-LM", "x bare", "bytes")
        for column in ("", *names):
            table.add_column(column, justify="left" if not column else "right")
        for name, costs in self.costs.items():
            ratios = [self.ratio(other, name) for other in (MEGATRON, f"bare loop, {self.kind}")]
            cpu = statistics.median(cost.cpu_seconds for cost in costs)
            wall = statistics.median(cost.wall_seconds for cost in costs)
            speed = [megabytes / cpu, tokens / 1e6 / cpu, wall, max(cost.peak_mb for cost in costs)]
            row = [f"{cpu:.2f}", *(f"{value:.1f}" for value in speed)]
            row += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            table.add_row(name, *row, "same" if self.same(name) else "DIFFERENT")
        return table

    def judge(self, goals: Goals) -> None:
        """Compare the figures with the goals."""
        for name in (OURS, FAST) if self.kind == "huggingface" else (OURS,):
            if (ratio := self.ratio(MEGATRON, name)) is not None:
                goals.at_least(f"{self.kind}, {name}", ratio, LEAST_X_MEGATRON[name], "x Megatron-LM")
        bare = self.ratio(f"bare loop, {self.kind}", OURS)
        assert bare is not None, "it is always run"
        goals.at_least(f"{self.kind}, {OURS}", bare, LEAST_X_BARE, "x the bare loop")
        megabytes = self.corpus.stat().st_size / 1e6
        if FAST in self.costs:
            speed = megabytes / statistics.median(cost.cpu_seconds for cost in self.costs[FAST])
            goals.at_least(f"{self.kind}, {FAST}", speed, LEAST_FAST_MB_PER_CPU_S, "MB per CPU-second")
        for name in self.files:
            if name != OURS:
                goals.the_same(f"{self.kind}, {name} and {OURS}", self.same(name))

    def judge_memory(self, goals: Goals, large: Path, line: Path) -> None:
        """Peak memory above the imports, on all sizes and shapes of inputs."""
        imports = self.imports_mb()
        for name, costs in self.costs.items():
            if name.startswith("megagpt"):
                peak = max(cost.peak_mb for cost in costs) - imports
                goals.at_most(f"{self.kind}, {name}", peak, MOST_MB_ABOVE_IMPORTS, "MB above the imports")
        others = [("reference", line)]
        if self.kind == "huggingface":
            others += [("auto", line), ("auto", large)]
        for backend, corpus in others:
            cost, size = self.run_megagpt(backend, corpus=corpus), corpus.stat().st_size / 1e6
            what = f"{self.kind}, megagpt, {backend}, {size:.0f} MB" + (" in one line" if corpus == line else "")
            peak = cost.peak_mb - imports
            goals.at_most(
                what, peak, MOST_MB_ABOVE_IMPORTS, f"MB above the imports ({size / cost.cpu_seconds:.1f} MB/CPU s)"
            )

    def same(self, name: str) -> bool:
        """Whether a side wrote what megagpt's reference did."""
        pairs = zip(self.files[name], self.files[OURS], strict=True)
        return all(ours is None or theirs is None or filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs)


def write_other_shapes(corpus: Path, folder: Path) -> tuple[Path, Path]:
    """A file of four times the corpus, and one line with all its texts."""
    large, line = folder / "large.jsonl", folder / "line.jsonl"
    with large.open("wb") as file:
        for _ in range(4):
            with corpus.open("rb") as part:
                shutil.copyfileobj(part, file)
    with corpus.open(encoding="utf-8") as lines, line.open("w", encoding="utf-8") as file:
        file.write('{"text": "')
        for document in lines:
            file.write(json.dumps(json.loads(document)["text"], ensure_ascii=False)[1:-1])
        file.write('"}\n')
    return large, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="JSONL with text under `text` (default: made here)")
    parser.add_argument("--megabytes", type=int, default=50, help="size of a corpus that is made here")
    parser.add_argument("--megatron-lm", type=Path, metavar="CLONE", help="run Megatron-LM's tool in this clone too")
    parser.add_argument("--megatron-python", default=sys.executable, metavar="PYTHON", help="runs Megatron-LM's tool")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=2, help="run megagpt with so many workers too")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; default 3")
    parser.add_argument("--kinds", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--work-dir", type=Path, help="keep corpus, tokenizers and outputs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = args.corpus or folder / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(corpus, args.megabytes)
        # A process starts with the peak memory of the one that starts it, which therefore stays small.
        training = multiprocessing.get_context("spawn").Process(
            target=train_tokenizers, args=(corpus, folder, args.vocab_size)
        )
        training.start()
        training.join()
        if training.exitcode:
            raise DataError("the tokenizers could not be trained; see above")
        large, line = write_other_shapes(corpus, folder)
        console, goals = Console(width=140, highlight=False), Goals()
        for kind in args.kinds:
            bench = Bench(kind, tokenizer_paths(folder)[kind], corpus, folder)
            for _ in range(args.rounds):
                run_round(bench, args.megatron_lm, args.megatron_python)
            backend = "auto" if kind == "huggingface" else "reference"
            if args.workers > 1:
                bench.run_megagpt(backend, args.workers)
            console.print(bench.table())
            bench.judge(goals)
            bench.judge_memory(goals, large, line)
    console.print("\n".join(goals.lines), soft_wrap=True)
    if args.megatron_lm is None:
        console.print("not measured: the ratios to Megatron-LM (give --megatron-lm)")
    console.print(f"{goals.missed} goals missed" if goals.missed else "all goals reached")
    return 1 if goals.missed else 0


def run_round(bench: Bench, megatron_lm: Path | None, megatron_python: str) -> None:
    """One turn of each side."""
    if megatron_lm is not None:
        bench.run_megatron(megatron_lm.resolve(), megatron_python)
    bench.run_bare(bench.kind)
    bench.run_megagpt("reference")
    if bench.kind == "huggingface":
        bench.run_bare("gigatoken")
        bench.run_megagpt("auto")


if __name__ == "__main__":
    run_command(main)
