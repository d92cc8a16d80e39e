"""Clean text before it is tokenised: strip HTML, drop bad documents and duplicates, mask personal data.

Writes the folder OUTPUT with JSONL files for tools/preprocess_data.py, and OUTPUT.report: how many documents were left
out by which step and why (report.txt, report.json), and samples of them (dropped/). The recipe says what is done: `web`
or a YAML file; its settings can be changed by step.key=value (`--keys` lists them). Inputs are those of
tools/preprocess_data.py. A job that was killed goes on where it stopped when it is started again.
"""

import argparse

from megagpt.cleaning.recipe import describe_keys, load_recipe
from megagpt.data.inputs import FORMATS
from megagpt.errors import DataError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="step.key=value", help="settings that win over the recipe's")
    parser.add_argument("--keys", action="store_true", help="list all settings of recipes, and end")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files, folders and globs")
    parser.add_argument("--input-format", choices=FORMATS, help="what the inputs hold (default: as their names say)")
    parser.add_argument("--output", metavar="FOLDER", help="folder to write")
    parser.add_argument("--recipe", default="web", metavar="NAME", help="shipped recipe or YAML file (default: web)")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key (column) of the text")
    parser.add_argument("--on-bad-line", choices=["error", "skip"], default="error", help="lines that are no documents")
    parser.add_argument(
        "--compression", choices=["gz", "zst", "none"], default="gz", help="of the output (default: gz)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made differently")
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    slurm = parser.add_argument_group("on a cluster")
    slurm.add_argument("--slurm", metavar="PARTITION", help="submit Slurm jobs that do the work, and end")
    slurm.add_argument("--slurm-print", action="store_true", help="print the batch files, submit nothing")
    slurm.add_argument("--slurm-time", default="12:00:00", metavar="LIMIT", help="of each job (default: 12:00:00)")
    slurm.add_argument("--slurm-jobs", type=int, default=-1, metavar="N", help="jobs at a time (default: no limit)")
    slurm.add_argument("--tasks-per-job", type=int, default=1, metavar="N", help="tasks that a job does in turn")
    slurm.add_argument("--slurm-memory", type=int, default=4, metavar="GB", help="of each job (default: 4)")
    slurm.add_argument("--slurm-setup", default="", metavar="COMMAND", help="shell command before each task")
    slurm.add_argument(
        "--sbatch", nargs="+", default=[], metavar="NAME=VALUE", help="more arguments of sbatch, such as account=me"
    )
    args = parser.parse_args()
    if not args.keys and not (args.input and args.output):
        parser.error("--input and --output are needed")
    return args


def main() -> None:
    args = parse_arguments()
    if args.keys:
        print(describe_keys())
        return
    recipe = load_recipe(args.recipe, args.overrides)
    try:
        from megagpt.cleaning.executors import SlurmOptions
        from megagpt.cleaning.job import Job, run_job
        from megagpt.cleaning.report import Report, report_folder, table
    except ModuleNotFoundError as error:
        raise DataError(f"cleaning needs {error.name}; run pip install 'megagpt[clean]'") from None
    job = Job(
        inputs=args.input,
        output=args.output,
        recipe=recipe,
        text_key=args.text_key,
        on_bad_line=args.on_bad_line,
        input_format=args.input_format,
        compression=args.compression,
        overwrite=args.overwrite,
    )
    slurm = None
    if args.slurm or args.slurm_print:
        slurm = SlurmOptions(
            partition=args.slurm or "",
            time=args.slurm_time,
            workers=args.slurm_jobs,
            tasks_per_job=args.tasks_per_job,
            memory_gb=args.slurm_memory,
            arguments=args.sbatch,
            setup=args.slurm_setup,
            print_only=args.slurm_print,
        )
    made = run_job(job, workers=args.workers, slurm=slurm)
    if isinstance(made, Report):
        print(table(made))
        print(
            f"{args.output}: {len(made.shards)} files; samples of what was dropped: {report_folder(job.output)}/dropped"
        )
    elif args.slurm_print:
        print("\n".join(made))
    else:
        print(f"submitted jobs {', '.join(made)}; the last one writes {args.output}; after a failure start this again")
        print(f"their output: {args.output}.work/stages/*/slurm/*.out")


if __name__ == "__main__":
    run_command(main)
