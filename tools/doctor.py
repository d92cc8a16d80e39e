"""Look for what would break a run, on this host or, under any launcher, on all hosts of a job; prints a table.

    python tools/doctor.py --config run.yaml --deepspeed_config ds.json --world-size 8
    srun python tools/doctor.py --config run.yaml --deepspeed_config ds.json

Exit status 1 if something would fail.
"""

import argparse
import json
import os
from pathlib import Path

from megagpt.errors import ConfigError, run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.parallel.deepspeed_launcher import find_launch
from megagpt.plan import load_deepspeed_config, load_run_config, make_plan

_MOST_PATIENCE = 86_400
"""A day: what is not there by then does not come."""


def main() -> int:
    """Parse the command line and call the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run config (YAML)")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed config (JSON)")
    parser.add_argument("--world-size", type=int, help="ranks of the run, if a single process looks at one host")
    parser.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS", help="for all ranks to come (default: 120)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there too")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    args = parser.parse_intermixed_args()
    if not 1 <= args.patience <= _MOST_PATIENCE:
        raise ConfigError(f"--patience={args.patience} must be 1 to {_MOST_PATIENCE} seconds; the usual value is 120")
    launch = find_launch()
    run_config = load_run_config(args.config, args.overrides)
    world_size = launch.world_size if launch.world_size > 1 else args.world_size or 1
    plan = make_plan(run_config, load_deepspeed_config(args.deepspeed_config), world_size)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch's traces of connections that fail: the table tells
    quiet_libraries(verbose=False)
    from megagpt.preflight import examine, table

    findings = examine(plan, launch, args.patience)
    if findings:
        print(table(findings))
    if args.json and launch.rank == 0:
        Path(args.json).write_text(json.dumps([finding.model_dump() for finding in findings], indent=1) + "\n")
    return int(any(finding.status == "failed" for finding in findings))


if __name__ == "__main__":
    run_command(main, leave_at_once=True)
