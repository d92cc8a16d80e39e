"""Check a run config and a DeepSpeed config for a number of ranks, and print the plan. Needs no GPU and no torch."""

import argparse
import json

from megagpt.errors import run_command
from megagpt.plan import config_reference, describe, load_deepspeed_config, load_run_config, make_plan, plan_as_dict


class PrintKeys(argparse.Action):
    """Print the reference of the run config and end, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(config_reference())
        parser.exit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", action=PrintKeys, nargs=0, help="list all keys of the run config and exit")
    parser.add_argument("--config", required=True, help="run config (YAML)")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed config (JSON)")
    parser.add_argument("--world-size", "--world_size", type=int, default=1, help="number of ranks; default 1")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. training.steps=100")
    args = parser.parse_intermixed_args()
    run = load_run_config(args.config, args.overrides)
    plan = make_plan(run, load_deepspeed_config(args.deepspeed_config), args.world_size)
    print(json.dumps(plan_as_dict(plan), indent=2) if args.json else describe(plan))


if __name__ == "__main__":
    run_command(main)
