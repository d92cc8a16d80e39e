"""Make a checkpoint and a run config of a Hugging Face model: `python tools/convert_from_hf.py --input I --output O`.

A run can also start from the folder itself: `model.init_from` in the run config.
"""

import argparse

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.storage import local_folder, location


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a Hugging Face model as a checkpoint of step 0 for any layout, with a run config beside it."
    )
    parser.add_argument("--input", required=True, type=local_folder, help="folder of a Hugging Face model")
    parser.add_argument("--output", required=True, type=location, help="folder to write; must not exist")
    parser.add_argument("--vocab-size", type=int, help="another number of tokens: new ones start at the mean")
    parser.add_argument("--tokenizer", help="tokenizer of the run (default: the folder's tokenizer.json)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read pickled weights (*.bin), as plain tensors only"
    )
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings")
    args = parser.parse_args()
    quiet_libraries(args.verbose)

    from megagpt.import_hf import import_checkpoint

    made = import_checkpoint(args.input, args.output, args.vocab_size, args.tokenizer, args.allow_pickle)
    print(f"{made.checkpoint}: {made.family}, {made.parameters:,} parameters, {made.weight_bytes / 1e6:,.1f} MB")
    for note in made.notes:
        print(f"note: {note}")
    print(f"{made.config}: a run config that starts from it; give it data.prefix")


if __name__ == "__main__":
    run_command(main)
