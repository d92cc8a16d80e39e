"""Train a sentencepiece tokenizer: PREFIX.model. Inputs are those of preprocess_data.py."""

import argparse

from megagpt.data.documents import iter_texts
from megagpt.data.tokenizer import CHAT_TOKENS, train_sentencepiece
from megagpt.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders and globs")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the tokenizer is PREFIX.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spell rare characters as bytes (default), else they become <unk> and the model cannot be exported",
    )
    parser.add_argument(
        "--split-digits", action=argparse.BooleanOptionalAction, default=True, help="a token per digit (default: yes)"
    )
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="share of characters with own tokens")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="special tokens; ids from 3")
    parser.add_argument("--chat-tokens", action="store_true", help=f"add the special tokens {' '.join(CHAT_TOKENS)}")
    parser.add_argument("--pad-token", action="store_true", help="add the special token <pad>")
    parser.add_argument("--text-key", default="text", help="key of the text in each object (default: text)")
    parser.add_argument("--on-bad-line", choices=["error", "skip"], default="error", help="lines that are no documents")
    parser.add_argument("--max-documents", type=int, default=0, help="train on this many drawn documents; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="draws the documents")
    parser.add_argument("--verbose", action="store_true", help="show sentencepiece's log")
    args = parser.parse_args()
    tokenizer = train_sentencepiece(
        iter_texts(args.input, args.text_key, args.on_bad_line),
        args.output_prefix,
        args.vocab_size,
        model_type=args.model_type,
        byte_fallback=args.byte_fallback,
        split_digits=args.split_digits,
        special_tokens=[*args.special_tokens, *(CHAT_TOKENS if args.chat_tokens else ())],
        pad=args.pad_token,
        character_coverage=args.character_coverage,
        max_documents=args.max_documents,
        seed=args.seed,
        verbose=args.verbose,
    )
    print(f"{tokenizer.path}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    run_command(main)
