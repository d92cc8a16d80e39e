"""Move small runs between layouts through their checkpoints, and write the table of what came of it."""

import argparse
from pathlib import Path

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if every curve goes on, 1 if one does not.", allow_abbrev=False
    )
    default = Path(__file__).with_name("CHECKPOINTS.md")
    parser.add_argument("--output", type=Path, default=default, help="document to write (default: %(default)s)")
    args = parser.parse_args()
    quiet_libraries(verbose=False)
    from megagpt.verify.moves import write_table

    return 0 if write_table(args.output) else 1


if __name__ == "__main__":
    run_command(main)
