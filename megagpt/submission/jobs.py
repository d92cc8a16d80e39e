"""The kinds of job: each checks what it is given, and says with which options and words its batch file is submitted."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.errors import ConfigError, DataError, LaunchError
from megagpt.plan import Plan, RunConfig, load_deepspeed_config, load_run_config, make_plan
from megagpt.plan.evaluation import evaluation_plan, read_saved_run
from megagpt.storage import location
from megagpt.submission.partition import Partition, find_partition
from megagpt.submission.resources import Request, Shape, find_shape, find_time, require_positive

FOLDER = "slurm"
CPUS_OF_ONE_TASK = 16
"""What the batch files of work without GPUs ask for."""


@dataclass(frozen=True)
class Job:
    """One job as sbatch is told of it."""

    batch_file: str
    arguments: tuple[str, ...]
    options: dict[str, str]
    """sbatch's, which win over those in the batch file."""
    variables: dict[str, str] = field(default_factory=dict)
    """Settings of the batch file, passed through the environment."""
    title: str = ""
    """What it is, in words."""
    plan: Plan | None = None
    """What its ranks will do."""
    paths: tuple[str, ...] = ()
    """Files and folders that it reads and writes."""
    remarks: tuple[str, ...] = ()
    """What the user should know before it waits in the queue, one sentence each."""

    def words(self, more_options: Sequence[str] = ()) -> list[str]:
        """The command that submits it."""
        options = [f"--{key}={value}" for key, value in self.options.items()]
        return ["sbatch", "--parsable", *options, *more_options, self.batch_file, *self.arguments]


def pretrain_job(
    request: Request, run_config: str, deepspeed_config: str, overrides: Sequence[str] = (), launcher: str = "srun"
) -> Job:
    """Pre-training by srun, or by DeepSpeed's launcher on each node.

    Raises:
        ConfigError: a rule of the plan is broken, or the nodes do not fit the ranks.
        LaunchError: partition or time are wrong.
    """
    run = load_run_config(run_config, overrides)
    deepspeed = load_deepspeed_config(deepspeed_config)
    partition = find_partition(request.partition)
    shape = find_shape(request, partition, run.parallel.ranks_per_replica)
    plan = make_plan(run, deepspeed, shape.world_size)
    batch_file = _batch_file("pretrain" if launcher == "srun" else "pretrain_deepspeed")
    options, variables = _ranks(shape, one_task=launcher == "deepspeed")
    return Job(
        batch_file,
        (run_config, deepspeed_config, *overrides),
        {**options, **_place(request, partition, batch_file)},
        variables,
        f"pre-training on {shape}",
        plan,
        tuple(paths_of_run(run)),
        tuple(_remarks(plan, shape)),
    )


def evaluation_job(
    request: Request, checkpoint: str, output: str, words: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Job:
    """The loss of a checkpoint on held-out text.

    Args:
        request: resources; if the number of ranks is not given, those of one copy of the model as it was trained.
        checkpoint: a checkpoint, or the checkpoint directory of a run.
        output: JSON file to write.
        words: further words for tools/evaluate.py.
        overrides: changes of the run's config, its layout for example.

    Raises:
        CheckpointError: there is none.
        ConfigError: a rule of the plan is broken, or the nodes do not fit the ranks.
        LaunchError: partition or time are wrong.
    """
    saved = read_saved_run(location(checkpoint))
    partition = find_partition(request.partition)
    shape = find_shape(request, partition, saved.with_overrides(overrides).parallel.ranks_per_replica)
    plan = evaluation_plan(saved, shape.world_size, overrides)
    batch_file = _batch_file("evaluate")
    options, variables = _ranks(shape)
    return Job(
        batch_file,
        (checkpoint, output, *words, *overrides),
        {**options, **_place(request, partition, batch_file)},
        variables,
        f"evaluation of {saved.folder} on {shape}",
        plan,
        (checkpoint, output, *paths_of_run(plan.run)),
    )


def conversion_job(request: Request, checkpoint: str, output: str, words: Sequence[str] = ()) -> Job:
    """A checkpoint becomes a Hugging Face folder.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: the folder exists already.
        LaunchError: partition or time are wrong.
    """
    saved = read_saved_run(location(checkpoint))
    if Path(output).exists() and "--overwrite" not in words:
        raise ConfigError(f"{output} exists already; give another folder, or `-- --overwrite` to replace it")
    partition, batch_file = find_partition(request.partition), _batch_file("convert")
    options = {**_one_task(request, partition), **_place(request, partition, batch_file)}
    return Job(
        batch_file,
        (checkpoint, output, *words),
        options,
        title=f"conversion of {saved.folder} to {output}",
        paths=(checkpoint, output, *paths_of_run(saved.run)),
    )


def preprocess_job(
    request: Request,
    tokenizer: str,
    output_prefix: str,
    inputs: Sequence[str],
    tasks: int = 1,
    words: Sequence[str] = (),
) -> Job:
    """Text becomes a dataset; the tasks of an array share the work, and the last one to end puts it together.

    Raises:
        DataError: tokenizer or inputs are not there.
        ConfigError: the number of tasks is none.
        LaunchError: partition or time are wrong.
    """
    if tasks < 1:
        raise ConfigError(f"--tasks={tasks} is less than 1; give the number of nodes that share the work")
    missing = [path for path in inputs if not Path(path).exists() and not glob.glob(path, recursive=True)]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file, folder or glob; check the path")
    if not Path(tokenizer).exists():
        raise DataError(f"tokenizer {tokenizer} does not exist; check the path")
    partition, batch_file = find_partition(request.partition), _batch_file("preprocess")
    options = {**_one_task(request, partition), **_place(request, partition, batch_file)}
    if tasks > 1:
        options |= {"array": f"0-{tasks - 1}", "output": "%x-%A-%a.out"}
    return Job(
        batch_file,
        (tokenizer, output_prefix, *inputs, *words),
        options,
        title=f"preprocessing of {', '.join(inputs[:3])}{' ...' if len(inputs) > 3 else ''} in {tasks} "
        f"task{'s' if tasks > 1 else ''}",
        paths=(tokenizer, output_prefix, *inputs),
    )


def paths_of_run(run: RunConfig) -> list[str]:
    """Files and folders that a run reads and writes."""
    datasets = [entry.prefix for entry in (*run.data.mixed, *run.data.validation, *run.data.test)]
    others = (run.data.tokenizer, run.model.init_from, run.checkpoint.directory, run.logging.directory)
    return [*datasets, *(path for path in others if path is not None)]


def _batch_file(name: str) -> str:
    path = Path(FOLDER) / f"{name}.sbatch"
    if not path.is_file():
        raise LaunchError(f"{path} is not in {Path.cwd()}; run this from the repository's folder")
    return str(path)


def _ranks(shape: Shape, one_task: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Options, and settings of the batch file, for a job of ranks.

    Args:
        shape: nodes and ranks.
        one_task: a launcher on each node is the only task there, and has the CPUs of all its ranks.
    """
    tasks = 1 if one_task else shape.ranks_per_node
    options = {
        "nodes": str(shape.nodes),
        "gpus-per-node": str(shape.gpus_per_node),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(shape.cpus_per_rank * shape.ranks_per_node // tasks),
    }
    return options, {} if shape.gpus_per_node else {"TASKS_PER_NODE": str(shape.ranks_per_node)}


def _one_task(request: Request, partition: Partition | None) -> dict[str, str]:
    """For work without GPUs: all CPUs that the file asks for, or as many as a node has."""
    require_positive(request)
    if request.cpus_per_rank is not None:
        return {"cpus-per-task": str(request.cpus_per_rank)}
    if partition is not None and partition.cpus_per_node < CPUS_OF_ONE_TASK:
        return {"cpus-per-task": str(partition.cpus_per_node)}
    return {}


def _place(request: Request, partition: Partition | None, batch_file: str) -> dict[str, str]:
    usual = re.findall(r"^#SBATCH --time=(\S+)", Path(batch_file).read_text(), re.M)[0]
    given = {"partition": request.partition, "account": request.account, "qos": request.qos}
    return {
        "time": find_time(request, partition, usual),
        **{key: value for key, value in given.items() if value is not None},
    }


def _remarks(plan: Plan, shape: Shape) -> list[str]:
    remarks = []
    if shape.nodes > 1 and shape.ranks_per_node % plan.tensor_parallel_size:
        remarks.append(
            f"the {plan.tensor_parallel_size} ranks of a tensor-parallel group do not lie within a node of "
            f"{shape.ranks_per_node} ranks: their traffic, which is the heaviest, crosses nodes"
        )
    if plan.run.checkpoint.directory is None:
        remarks.append(
            "checkpoint.directory is not set: nothing is saved, so that a stop or a crash loses all; the job is not "
            "started again"
        )
    return remarks
