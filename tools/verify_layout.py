"""Prove that a layout trains the model that one process would train, on processes of this machine."""

import argparse
import json
import os
from pathlib import Path

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.plan import load_deepspeed_config, load_run_config, make_plan


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if all quantities agree, 1 if one does not.", allow_abbrev=False
    )
    parser.add_argument("config", help="run config (YAML); the model and the number of ranks are shrunk")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed config (JSON)")
    parser.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks of the run"
    )
    parser.add_argument("--steps", type=int, default=20, help="updates to compare (default: 20)")
    parser.add_argument("--max-ranks", type=int, default=8, help="processes to start at most (default: 8)")
    parser.add_argument(
        "--gpus", action="store_true", help="compute on this machine's GPUs, which ranks share if they are fewer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts to FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    args = parser.parse_intermixed_args()

    run = load_run_config(args.config, args.overrides)
    plan = make_plan(run, load_deepspeed_config(args.deepspeed_config), args.world_size)
    quiet_libraries(verbose=False)
    from megagpt.verify.layout import verify_layout

    report = verify_layout(plan, args.steps, args.max_ranks, args.gpus)
    print(report.text())
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if report.passed else 1


if __name__ == "__main__":
    run_command(main)
