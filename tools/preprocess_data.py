"""Tokenise JSONL text into a dataset: PREFIX.bin, PREFIX.idx (Megatron's format) and the manifest PREFIX.json."""

import argparse

from megagpt.data.preprocess import preprocess
from megagpt.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL files, one object a line")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the dataset without .bin")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="sentencepiece .model, tokenizer.json or its folder, .tiktoken",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--seed", type=int, default=None, help="shuffle the documents; default: keep their order")
    parser.add_argument("--on-bad-line", choices=["error", "skip"], default="error", help="lines that are no documents")
    parser.add_argument("--json-keys", "--text-key", default="text", metavar="KEY", help="key of the text")
    args = parser.parse_args()
    manifest = preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer,
        text_key=args.json_keys,
        append_eod=args.append_eod,
        seed=args.seed,
        workers=args.workers,
        on_bad_line=args.on_bad_line,
    )
    print(
        f"{args.output_prefix}.bin: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
        f" ({manifest.dtype}, vocabulary {manifest.vocab_size});"
        f" skipped {manifest.skipped_empty} empty documents and {manifest.skipped_bad} bad lines"
    )


if __name__ == "__main__":
    run_command(main)
