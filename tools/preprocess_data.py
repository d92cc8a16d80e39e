"""Tokenise text into a dataset: PREFIX.bin, PREFIX.idx (Megatron's format) and the manifest PREFIX.json.

Inputs: JSONL (.jsonl, .json, .ndjson), text files (.txt, .text, .md; one document each), both also .gz or .zst, Parquet
(.parquet), folders and globs of them. A job that was killed goes on where it stopped when it is started again. Several
processes of one job share the work: Slurm array tasks, `srun`, `mpirun`, or --rank and --world-size.
"""

import argparse
import os

from megagpt.data.inputs import FORMATS
from megagpt.data.job_rank import find_job_rank
from megagpt.errors import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders and globs")
    parser.add_argument("--input-format", choices=FORMATS, help="what the inputs hold (default: as their names say)")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the dataset without .bin")
    parser.add_argument(
        "--tokenizer",
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json or its folder, or tiktoken file",
    )
    parser.add_argument(
        "--json-keys",
        "--text-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (columns) of the texts; several give datasets PREFIX_KEY_document",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    parser.add_argument(
        "--special-tokens-in-text",
        action="store_true",
        help="special tokens that a text spells out, as those of a chat format, mean themselves (those of "
        "tokenizer.json do so anyway); for text of your own making only",
    )
    parser.add_argument(
        "--min-length",
        type=int,
        default=1,
        metavar="CHARACTERS",
        help="leave out documents with fewer characters (default 1: empty ones; 0: none, as Megatron-LM)",
    )
    parser.add_argument("--seed", type=int, default=None, help="shuffle the documents; default: keep their order")
    parser.add_argument("--on-bad-line", choices=["error", "skip"], default="error", help="lines that are no documents")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that was made differently")
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--threads", type=int, default=1, help="threads of the tokenizer's library in each process")
    parser.add_argument(
        "--backend",
        choices=["auto", "reference", "gigatoken"],
        default="auto",
        help="gigatoken is faster for tokenizer.json; auto: where it gives the same tokens on a probe of the inputs",
    )
    parser.add_argument("--rank", type=int, help="which of --world-size processes (default: as Slurm or MPI say)")
    parser.add_argument("--world-size", type=int, help="processes that share this job, started on any machines")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    ranks = find_job_rank(args.rank, args.world_size)
    # numpy would start a thread for each core, for matrices that nobody multiplies here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megagpt.data.preprocess import Job, run_job

    job = Job(
        inputs=args.input,
        prefix=args.output_prefix,
        tokenizer=args.tokenizer,
        text_keys=args.json_keys,
        append_eod=args.append_eod,
        min_length=args.min_length,
        seed=args.seed,
        on_bad_line=args.on_bad_line,
        input_format=args.input_format,
        overwrite=args.overwrite,
        special_tokens_in_text=args.special_tokens_in_text,
    )
    made = run_job(job, ranks=ranks, workers=args.workers, threads=args.threads, backend=args.backend)
    if not made:
        print(f"rank {ranks.rank} of {ranks.world_size} is done; the last one to finish merges")
    for prefix, manifest in zip(job.prefixes(), made, strict=False):
        print(
            f"{prefix}.bin: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
            f" ({manifest.dtype}, vocabulary {manifest.vocab_size});"
            f" skipped {manifest.skipped_short} documents as too short and {manifest.skipped_bad} bad lines"
        )


if __name__ == "__main__":
    run_command(main)
