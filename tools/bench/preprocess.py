"""MB and tokens per CPU-second of preprocessing: megagpt, Megatron-LM, and the bare loop around the tokenizer library.

All sides tokenise the same corpus with the same tokenizer, each in its own process with one worker. CPU seconds are
user and system time of the process and its children, memory is the peak of the largest process. The files are compared
byte by byte. Megatron-LM is not part of megagpt: give the folder of a clone with --megatron-lm. Without --corpus the
text is Python source code found on this machine.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megagpt.errors import DataError, run_command

ROOT = Path(__file__).resolve().parents[2]
GOALS = (
    "Goals: reference library at least 1.9 x Megatron-LM and 0.95 of the bare loop per CPU-second; gigatoken at least"
    " 25 x Megatron-LM and 40 MB per CPU-second; less than 300 MB above the imports."
)
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


class Bench:
    """One corpus and one tokenizer; sides are added as they are run."""

    def __init__(self, kind: str, tokenizer: Path, corpus: Path, folder: Path):
        self.kind, self.tokenizer, self.corpus, self.folder = kind, tokenizer, corpus, folder
        self.costs: dict[str, Cost] = {}
        self.files: dict[str, tuple[Path, Path | None]] = {}
        self._log = folder / "log"

    def run_megagpt(self, backend: str, workers: int) -> None:
        """The command as a user gives it."""
        name = f"megagpt, {backend}" + (f", {workers} workers" if workers > 1 else "")
        prefix = self.folder / f"ours-{len(self.costs)}"
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(self.corpus)]
        command += ["--output-prefix", str(prefix), "--tokenizer", str(self.tokenizer), "--append-eod"]
        command += ["--backend", backend, "--workers", str(workers), "--overwrite"]
        self.costs[name] = measure(command, self._log, PYTHONPATH=str(ROOT))
        self.files[name] = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")

    def run_bare(self, kind: str) -> None:
        """The loop around the library."""
        name, output = f"bare loop, {kind}", self.folder / f"bare-{kind}.bin"
        command = [sys.executable, "-c", BARE, kind, str(self.corpus), str(self.tokenizer), str(output)]
        self.costs[name] = measure(command, self._log)
        self.files[name] = output, None

    def run_megatron(self, clone: Path) -> None:
        """Megatron-LM's tools/preprocess_data.py."""
        kind = "HuggingFaceTokenizer" if self.kind == "huggingface" else "GPTSentencePieceTokenizer"
        prefix = self.folder / "megatron"
        command = [sys.executable, str(clone / "tools" / "preprocess_data.py"), "--input", str(self.corpus)]
        command += ["--output-prefix", str(prefix), "--tokenizer-type", kind, "--tokenizer-model", str(self.tokenizer)]
        command += ["--append-eod", "--workers", "1"]
        self.costs["Megatron-LM"] = measure(command, self._log, PYTHONPATH=str(clone))
        self.files["Megatron-LM"] = Path(f"{prefix}_text_document.bin"), Path(f"{prefix}_text_document.idx")

    def table(self) -> Table:
        """Figures of all sides, with the ratio to Megatron-LM and to the bare loop of the reference library."""
        megabytes = self.corpus.stat().st_size / 1e6
        tokens = self.files["megagpt, reference"][0].stat().st_size / 2
        table = Table(title=f"{self.kind}: {megabytes:.1f} MB of JSONL, {tokens / 1e6:.1f} M tokens")
        for column in (
            "",
            "CPU s",
            "MB/CPU s",
            "M tokens/CPU s",
            "wall s",
            "peak MB",
            "x Megatron-LM",
            "x bare",
            "bytes",
        ):
            table.add_column(column, justify="left" if not column else "right")
        for name, cost in self.costs.items():
            against = [self.costs.get("Megatron-LM"), self.costs.get(f"bare loop, {self.kind}")]
            ratios = [f"{other.cpu_seconds / cost.cpu_seconds:.2f}" if other else "-" for other in against]
            speed = [megabytes / cost.cpu_seconds, tokens / 1e6 / cost.cpu_seconds, cost.wall_seconds, cost.peak_mb]
            row = [f"{cost.cpu_seconds:.2f}", *(f"{value:.1f}" for value in speed)]
            table.add_row(name, *row, *ratios, "same" if self._same(name) else "DIFFERENT")
        return table

    def _same(self, name: str) -> bool:
        pairs = zip(self.files[name], self.files["megagpt, reference"], strict=True)
        return all(ours is None or theirs is None or filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="JSONL with text under `text` (default: made here)")
    parser.add_argument("--megabytes", type=int, default=50, help="size of a corpus that is made here")
    parser.add_argument("--megatron-lm", type=Path, metavar="CLONE", help="run Megatron-LM's tool in this clone too")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=1, help="run megagpt with so many workers too")
    parser.add_argument("--kinds", nargs="+", choices=["huggingface", "sentencepiece"], default=None)
    parser.add_argument("--work-dir", type=Path, help="keep corpus, tokenizers and outputs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = args.corpus or folder / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(corpus, args.megabytes)
        imports = measure(
            [sys.executable, "-c", "import megagpt.data.preprocess"], folder / "log", PYTHONPATH=str(ROOT)
        )
        # A process starts with the peak memory of the one that starts it, which therefore stays small.
        training = multiprocessing.get_context("spawn").Process(
            target=train_tokenizers, args=(corpus, folder, args.vocab_size)
        )
        training.start()
        training.join()
        if training.exitcode:
            raise DataError("the tokenizers could not be trained; see above")
        console = Console(width=140)
        for kind, tokenizer in tokenizer_paths(folder).items():
            if args.kinds and kind not in args.kinds:
                continue
            bench = Bench(kind, tokenizer, corpus, folder)
            if args.megatron_lm:
                bench.run_megatron(args.megatron_lm.resolve())
            for library in (kind, *(["gigatoken"] if kind == "huggingface" else [])):
                bench.run_bare(library)
            for backend in ("reference", *(["auto"] if kind == "huggingface" else [])):
                bench.run_megagpt(backend, 1)
            if args.workers > 1:
                bench.run_megagpt("reference", args.workers)
            console.print(bench.table())
        console.print(f"The imports of megagpt's tool take {imports.peak_mb:.0f} MB, {imports.cpu_seconds:.2f} CPU s.")
        console.print(GOALS)


if __name__ == "__main__":
    run_command(main)
