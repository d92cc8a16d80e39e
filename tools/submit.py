"""Submit a job to Slurm: checked first, with nodes, GPUs, CPUs and time filled in, alone or as a chain.

    python tools/submit.py pretrain run.yaml ds_configs/zero1_bf16.json --nodes 2 --chain 5 [key=value ...]
    python tools/submit.py preprocess data/tokenizer.model data/dataset data/corpus.jsonl --tasks 4
    python tools/submit.py evaluate runs/mine/checkpoints runs/mine/evaluation.json
    python tools/submit.py convert runs/mine/checkpoints runs/mine/hf -- --dtype bfloat16

What Slurm knows of the partition is taken into account: GPUs and CPUs of its nodes, its time limit. --print shows the
commands instead, on any machine. Words after `--` go to the tool that the job runs.
"""

import argparse
import sys

from megagpt.errors import ConfigError, run_command
from megagpt.plan import describe
from megagpt.submission import (
    Chain,
    Job,
    Request,
    conversion_job,
    evaluation_job,
    in_container,
    preprocess_job,
    pretrain_job,
    script,
    submit,
)

KINDS = {
    "pretrain": "train",
    "evaluate": "loss of a checkpoint on held-out text",
    "convert": "checkpoint to Hugging Face folder",
    "preprocess": "text to dataset",
}


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line up to `--`."""
    kinds = "\n".join(f"  {kind:<12}{what}" for kind, what in KINDS.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s KIND ... [options]",
        description=f"{__doc__}\nkinds, each with a --help of its own:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help=argparse.SUPPRESS)
    kind = parser.parse_args(words[:1]).kind
    # Not argparse's subparsers, for which overrides could not stand anywhere.
    parser = argparse.ArgumentParser(prog=f"{parser.prog} {kind}", description=f"Submit a job: {KINDS[kind]}.")
    parser.set_defaults(kind=kind)
    if kind == "pretrain":
        parser.add_argument("run", metavar="RUN.yaml")
        parser.add_argument("deepspeed", metavar="DEEPSPEED.json")
    elif kind == "preprocess":
        parser.add_argument("tokenizer")
        parser.add_argument("output_prefix")
        parser.add_argument("inputs", nargs="+", metavar="INPUT")
        parser.add_argument("--tasks", type=int, default=1, help="of a job array: nodes that share the work (1)")
    else:
        parser.add_argument("checkpoint", help="a checkpoint, or a run's checkpoint directory")
        parser.add_argument("output", help="file (JSON) to write" if kind == "evaluate" else "folder to write")
    if kind in ("pretrain", "evaluate"):
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
        _add_ranks(parser)
    else:
        parser.add_argument("--cpus", type=int, help="default: 16, or those of a node")
    if kind == "pretrain":
        parser.add_argument("--launcher", choices=["srun", "deepspeed"], default="srun", help="starts the ranks (srun)")
    _add_slurm(parser)
    return parser.parse_intermixed_args(words[1:])


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument("--world-size", "--world_size", type=int, help="default: one copy of the model")
    group.add_argument("--nodes", type=int, help="instead of --world-size")
    group.add_argument("--gpus-per-node", type=int, help="default: those of the partition's nodes, else 8; 0: use CPUs")
    group.add_argument("--ranks-per-node", type=int, help="on CPUs")
    group.add_argument("--cpus-per-rank", type=int, help="default: 8, or the node's CPUs shared by its ranks")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm")
    group.add_argument("--partition", help="default: the cluster's")
    group.add_argument("--account")
    group.add_argument("--qos")
    group.add_argument("--time", help="as 12:00:00 or 2-12 (default: the batch file's, or what the partition allows)")
    group.add_argument("--after", default="", metavar="JOBS", help="start once these have ended well: 123 or 123,124")
    group.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each going on where the last ended")
    group.add_argument("--chain-if", choices=["any", "ok"], default="any", help="how a job must end for the next (any)")
    group.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--exclude=n7")
    group.add_argument("--container", metavar="IMAGE", help=".sif (Apptainer), or Pyxis's; see slurm/container.sh")
    group.add_argument("--container-mounts", metavar="A:B,...", help="further folders; those of the config are found")
    group.add_argument("--print", action="store_true", help="show the commands, submit nothing")


def main() -> None:
    """Parse the command line and call the library."""
    words, more = sys.argv[1:], []
    if "--" in words:
        words, more = words[: words.index("--")], words[words.index("--") + 1 :]
    args = parse_arguments(words)
    job = job_of(args, more)
    if args.container:
        job = in_container(job, args.container, args.container_mounts.split(",") if args.container_mounts else ())
    elif args.container_mounts:
        raise ConfigError("--container-mounts without --container; give the image too")
    chain = Chain(args.chain, tuple(filter(None, args.after.split(","))), args.chain_if == "ok", tuple(args.sbatch))
    chain.require_possible(job)
    if job.plan is not None:
        print(describe(job.plan), end="\n\n", file=sys.stderr)
    for remark in job.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if args.print:
        print(script(job, chain))
        return
    numbers = submit(job, chain)
    print(f"{'jobs' if len(numbers) > 1 else 'job'} {', '.join(numbers)}: {job.title}, {job.options['time']}"
          + (" each" if len(numbers) > 1 else ""))  # fmt: skip


def job_of(args: argparse.Namespace, more: list[str]) -> Job:
    """What the command line asks for."""
    request = Request(
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        time=args.time,
        cpus_per_rank=args.cpus if "cpus" in args else args.cpus_per_rank,
        **{key: getattr(args, key, None) for key in ("world_size", "nodes", "gpus_per_node", "ranks_per_node")},
    )
    if args.kind == "pretrain":
        if more:
            raise ConfigError(f"{' '.join(more)} after `--`: training takes key=value changes only; write them without")
        return pretrain_job(request, args.run, args.deepspeed, args.overrides, args.launcher)
    if args.kind == "evaluate":
        return evaluation_job(request, args.checkpoint, args.output, more, args.overrides)
    if args.kind == "convert":
        return conversion_job(request, args.checkpoint, args.output, more)
    return preprocess_job(request, args.tokenizer, args.output_prefix, args.inputs, args.tasks, more)


if __name__ == "__main__":
    run_command(main)
