"""Measure the table of verified layouts, tools/LAYOUTS.md, on processes of this machine."""

import argparse
from pathlib import Path

from megagpt.errors import run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.verify.rows import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if all rows are within their bounds, 1 if not.", allow_abbrev=False
    )
    parser.add_argument(
        "--gpus", action="store_true", help="compute on this machine's GPUs, which ranks share if they are fewer"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="document to write (default: tools/LAYOUTS.md, with --gpus tools/LAYOUTS_ON_GPUS.md)",
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="measure only the rows in whose line WORDS stand")
    parser.add_argument(
        "--new", action="store_true", help="measure only rows that the document lacks, and keep the others"
    )
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    args = parser.parse_args()

    default = Path(__file__).with_name("LAYOUTS_ON_GPUS.md" if args.gpus else "LAYOUTS.md")
    output = args.output or default
    rows = [row for row in ROWS if args.only in row.key]
    if not rows:
        parser.error(f"no row has {args.only!r} in its line; see --list")
    if args.only and output == default and not args.list:
        parser.error("--only writes a part of the table: name another file with --output")
    if args.list:
        print("\n".join(row.key for row in rows))
        return 0
    quiet_libraries(verbose=False)
    from megagpt.verify.table import write_table

    return 0 if write_table(rows, output, args.new, args.gpus) else 1


if __name__ == "__main__":
    run_command(main)
