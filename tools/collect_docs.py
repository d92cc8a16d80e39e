"""Collect real English text that is installed anyway, documentation of Python and its packages, as JSONL."""

import argparse

from megagpt.data.docs_corpus import collect_docs
from megagpt.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument("--max-mb", type=float, default=30.0, help="megabytes of text at most (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default: 0)")
    parser.add_argument("--workers", type=int, default=None, help="processes; the result does not depend on it")
    args = parser.parse_args()
    summary = collect_docs(args.output, max_mb=args.max_mb, seed=args.seed, workers=args.workers)
    print(
        f"{args.output}: {summary.num_documents:,} documents, {summary.num_bytes / 1e6:.1f} MB of text"
        f" from {summary.num_files:,} files"
    )


if __name__ == "__main__":
    run_command(main)
