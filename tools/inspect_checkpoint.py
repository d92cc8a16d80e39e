"""List, verify and compare checkpoints, and show what they hold."""

import argparse

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.storage import location


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 if all is well, 1 if one of the list is damaged or two differ, 2 after errors: there is "
        "no checkpoint, or one that is to be compared or shown is damaged.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=location, help="a checkpoint, or a run's checkpoint.directory")
    parser.add_argument("--verify", action="store_true", help="read everything and compare the hashes")
    parser.add_argument("--parameters", action="store_true", help="shape and norms of each parameter (of the newest)")
    parser.add_argument(
        "--compare", type=location, metavar="OTHER", help="compare with another checkpoint, tensor by tensor"
    )
    pinning = parser.add_mutually_exclusive_group()
    pinning.add_argument("--pin", action="store_true", help="keep this checkpoint for ever")
    pinning.add_argument("--unpin", action="store_true", help="leave it to the run's retention again")
    args = parser.parse_args()

    quiet_libraries(verbose=False)
    from megagpt.checkpoint import CheckpointReader, find_checkpoint
    from megagpt.checkpoint.inspection import comparison, details, parameter_table, summarise, summary_table
    from megagpt.checkpoint.retention import set_pinned

    if args.compare is not None:
        folders = find_checkpoint(args.checkpoint), find_checkpoint(args.compare)
        print(f"{folders[0]} and {folders[1]}")
        same, text = comparison(*map(CheckpointReader, folders))
        print(text)
        return 0 if same else 1
    if args.pin or args.unpin:
        set_pinned(find_checkpoint(args.checkpoint), args.pin)
    summaries = summarise(args.checkpoint, with_hash=args.verify)
    print(summary_table(summaries))
    damaged = [summary for summary in summaries if summary.problems]
    if args.verify:
        print(f"{len(summaries) - len(damaged)} of {len(summaries)} checkpoints are intact")
    if len(summaries) == 1 and summaries[0].reader is not None:
        print(f"\n{details(summaries[0].reader)}")
    if args.parameters:
        print(f"\n{parameter_table(CheckpointReader(find_checkpoint(args.checkpoint)))}")
    return 1 if damaged else 0


if __name__ == "__main__":
    run_command(main)
