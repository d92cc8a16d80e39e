"""Keep a Slurm job going: asked by the batch files before the ranks start, and after they have ended.

    python tools/restarts.py begin --config run.yaml [key=value ...]
    python tools/restarts.py end --status 0 --config run.yaml [key=value ...]

`begin` refuses a job that was started several times without getting beyond the same checkpoint, and tells what has
ended the start before, if its ranks knew. `end` has the job queued again if it was stopped before its last step or has
crashed, without the node that failed if there are others; with `--requeue no` the next job of a chain goes on instead.
"""

import argparse
import functools

from megagpt.errors import run_command
from megagpt.plan import load_run_config
from megagpt.supervise import restarts


def main() -> int:
    """Parse the command line and call the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moment", choices=["begin", "end"], help="of the job")
    parser.add_argument("--config", required=True, help="run config (YAML)")
    parser.add_argument("--most-idle", type=int, default=3, help="starts in a row without a new checkpoint (3)")
    parser.add_argument("--status", type=int, default=0, help="exit status of the ranks")
    parser.add_argument("--requeue", default="yes", help="no: never queue the job again (yes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    args = parser.parse_intermixed_args()
    run = load_run_config(args.config, args.overrides)
    if args.moment == "end":
        say = functools.partial(print, flush=True)
        return restarts.end(run, args.most_idle, args.status, args.requeue != "no", say=say)
    if words := restarts.begin(run, args.most_idle):
        print(words)
    return 0


if __name__ == "__main__":
    run_command(main)
