"""MB per CPU-second and peak memory of cleaning: megagpt, and a script of datatrove for the same steps.

Both read the same corpus and take the steps of the recipe `web` as far as datatrove has them without downloads:
characters, Gopher's and C4's rules, personal data, MinHash. Words are split in the same way. Each side runs in one
process of its own, and they take turns. Last, megagpt runs the whole recipe, which also finds languages, turns HTML
into text, tidies white space, finds exact duplicates and keeps count of bytes and samples. Without --corpus the text is
documentation found on this machine.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from preprocess import Cost, measure

from megagpt.errors import run_command

ROOT = Path(__file__).resolve().parents[2]
GOAL = 1.2
COMMON = ["html=false", "whitespace=false", "language=false", "exact_duplicates=false", "samples.per_reason=0"]

# What datatrove's examples do, in one process: clean and sign, find pairs, group, leave out.
PEER = """
import sys, xxhash
corpus, folder, root = sys.argv[1:]
sys.path.insert(0, root)
import datatrove.utils.hashes.xxhash as hashes
hashes.xxhash64 = lambda text: xxhash.xxh64_intdigest(text.encode())  # xxhash 4 takes no strings
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature)
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from megagpt.cleaning.words import WORDS

def reader(path):
    return JsonlReader(path, compression="infer")

def run(name, pipeline, tasks=1):
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs/{name}").run()

def dropped(name):
    return JsonlWriter(f"{folder}/dropped/{name}")

run("clean", [
    reader(corpus),
    FTFYFormatter(normalization="NFC"),
    GopherQualityFilter(language=WORDS, exclusion_writer=dropped("quality")),
    GopherRepetitionFilter(language=WORDS, exclusion_writer=dropped("repetition")),
    C4QualityFilter(filter_no_terminal_punct=False, language=WORDS, exclusion_writer=dropped("c4")),
    PIIFormatter(),
    JsonlWriter(f"{folder}/kept"),
])
run("sign", [reader(f"{folder}/kept"), MinhashDedupSignature(f"{folder}/signatures", language=WORDS)])
run("pairs", [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/pairs")], tasks=14)
run("groups", [MinhashDedupCluster(f"{folder}/pairs", f"{folder}/remove")])
run("shards", [
    reader(f"{folder}/kept"),
    MinhashDedupFilter(f"{folder}/remove", exclusion_writer=dropped("duplicates")),
    JsonlWriter(f"{folder}/out"),
])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FILE", help="JSONL (default: documentation on this machine)")
    parser.add_argument("--max-mb", type=float, default=10.0, help="size of that documentation (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as name:
        folder = Path(name)
        corpus = Path(args.corpus) if args.corpus else folder / "corpus.jsonl"
        if not args.corpus:
            from megagpt.data.docs_corpus import collect_docs

            collect_docs(str(corpus), max_mb=args.max_mb, seed=0, workers=1)
        return compare(corpus.absolute(), folder, args.rounds)


def compare(corpus: Path, folder: Path, rounds: int) -> int:
    """Run all sides and print what they took; 1 if the goal is missed."""
    megabytes = corpus.stat().st_size / 1e6
    costs: dict[str, list[Cost]] = {"datatrove script": [], "megagpt, same steps": [], "megagpt, whole recipe": []}
    (folder / "peer.py").write_text(PEER)
    for turn in range(rounds):
        for side, found in costs.items():
            output = folder / f"{side.replace(' ', '-').replace(',', '')}-{turn}"
            found.append(measure(command(side, corpus, output, folder), folder / "log"))
            print(f"{side}: {found[-1].cpu_seconds:.1f} CPU-s", file=sys.stderr, flush=True)
    print(f"{megabytes:.1f} MB, one process, medians of {rounds} turns")
    for side, found in costs.items():
        seconds = statistics.median(cost.cpu_seconds for cost in found)
        peak = max(cost.peak_mb for cost in found)
        print(f"{side:22} {megabytes / seconds:6.2f} MB per CPU-second {peak:6.0f} MB peak memory")
    pairs = zip(costs["datatrove script"], costs["megagpt, same steps"], strict=True)
    ratio = statistics.median(theirs.cpu_seconds / ours.cpu_seconds for theirs, ours in pairs)
    print(f"the same steps: {ratio:.2f} x datatrove script (goal: {GOAL})")
    return int(ratio < GOAL)


def command(side: str, corpus: Path, output: Path, folder: Path) -> list[str]:
    """How to run a side."""
    if side == "datatrove script":
        return [sys.executable, str(folder / "peer.py"), str(corpus), str(output), str(ROOT)]
    overrides = COMMON if side == "megagpt, same steps" else []
    tool = [sys.executable, str(ROOT / "tools" / "clean_data.py"), "--input", str(corpus), "--output", str(output)]
    return [*tool, *overrides]


if __name__ == "__main__":
    run_command(main)
