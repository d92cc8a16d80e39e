"""The loss of a checkpoint on held-out text: `python tools/evaluate.py --checkpoint DIR`, or under any launcher.

Every sample is counted once, whatever the layout: the model keeps that of its training if the number of ranks allows
it, else each rank has the whole model; key=value overrides decide otherwise.
"""

import argparse
from pathlib import Path

from megagpt.errors import ConfigError, LaunchError, MegagptError, run_command
from megagpt.parallel.console import muted, quiet_libraries
from megagpt.parallel.deepspeed_launcher import find_launch
from megagpt.plan import describe, load_deepspeed_config
from megagpt.plan.evaluation import evaluation_plan, read_saved_run
from megagpt.storage import location


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, type=location, help="a checkpoint, or a run's checkpoint directory"
    )
    parser.add_argument("--split", nargs="+", choices=["validation", "test"], help="of the run's data (default: both)")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="datasets to take instead, each as a whole")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--max-samples", type=int, help="of each dataset, from its beginning (default: all)")
    parser.add_argument("--deepspeed_config", help="precision, ZeRO stage, micro-batch (default: those of the run)")
    parser.add_argument("--plan", action="store_true", help="print the plan for --world-size ranks and end; no torch")
    parser.add_argument("--world-size", "--world_size", type=int, help="with --plan (default: 1)")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    return parser.parse_intermixed_args()


def require_consistent(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: two do.
    """
    if args.split and args.data:
        raise ConfigError("--split and --data exclude each other: given datasets are evaluated as a whole")
    if args.max_samples is not None and args.max_samples < 1:
        raise ConfigError(f"--max-samples={args.max_samples} is less than 1; give 1 or more")
    if args.world_size is not None and not args.plan:
        raise ConfigError("--world-size goes with --plan only; the number of ranks is up to the launcher")


def main() -> int:
    """Parse the command line and call the library."""
    args = parse_arguments()
    launch = None if args.plan else find_launch()
    quiet_libraries(args.verbose)
    try:
        require_consistent(args)
        saved = read_saved_run(args.checkpoint)
        deepspeed = None if args.deepspeed_config is None else load_deepspeed_config(args.deepspeed_config)
        world_size = (args.world_size or 1) if launch is None else launch.world_size
        plan = evaluation_plan(saved, world_size, args.overrides, deepspeed)
        if launch is None:
            print(describe(plan))
            return 0
        with muted(args.verbose):
            from megagpt.score import SPLITS, score_checkpoint, write_scores

        scores = score_checkpoint(
            plan,
            launch,
            saved.folder,
            tuple(args.split or SPLITS),
            tuple(args.data or ()),
            args.max_samples,
            args.verbose,
        )
    except LaunchError:
        raise
    except MegagptError as error:
        if launch is not None and launch.local_rank != 0:  # all ranks know; one message per host
            return error.exit_code
        raise
    if launch.rank == 0:
        print(f"{saved.folder} (step {saved.step:,}), {plan.precision}")
        for score in scores:
            where = score.dataset if score.split is None else f"{score.split} of {score.dataset}"
            print(f"{where}: loss {score.loss:.6f}, perplexity {score.perplexity:.4g}, {score.samples:,} samples of "
                  f"{plan.seq_length:,} tokens")  # fmt: skip
        if args.output is not None:
            write_scores(args.output, scores, plan, saved.folder, saved.step)
    return 0


if __name__ == "__main__":
    run_command(main, leave_at_once=True)
