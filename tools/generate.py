"""Continue a prompt with a trained model: `python tools/generate.py --checkpoint DIR --prompt TEXT`."""

import argparse

from megagpt.errors import ConfigError, run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.storage import location


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a prompt with a trained model, in one process.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=location,
        help="a checkpoint, or a run's checkpoint.directory",
    )
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokenizer", help="tokenizer file (default: the one that the run was trained with)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 (default): all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings")
    args = parser.parse_args()
    quiet_libraries(args.verbose)

    from megagpt.data.tokenizer import Tokenizer
    from megagpt.generate import Sampling, generate, load_model, tokenizer_path

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    model, reader = load_model(args.checkpoint)
    path = tokenizer_path(reader, args.tokenizer)
    if path is None:
        raise ConfigError("the run was trained without data.tokenizer; give --tokenizer PATH")
    tokenizer = Tokenizer.load(path)
    for number, prompt in enumerate(args.prompt):
        tokens = list(generate(model, reader, tokenizer, prompt, args.max_new_tokens, sampling))
        if number:
            print()
        print(tokenizer.decode([*tokenizer.encode(prompt), *tokens]), flush=True)


if __name__ == "__main__":
    run_command(main)
