"""Runs stages: datatrove's executors, on this machine or by Slurm, adapted where they would mislead or hang.

datatrove marks each completed task; a task that is started again is passed over.
"""

import copy
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import datatrove.executor.base
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from megagpt.cleaning.stages import Places, Stage
from megagpt.data.progress import ByteProgress
from megagpt.data.workers import WorkerKilledError, end_with_parent
from megagpt.errors import DataError


def _log_to_file(logging_dir: Any, rank: int, *_: Any, **__: Any) -> Any:
    """datatrove's log of a task goes to its file alone: on the terminal it would hide what matters."""
    logger.remove()
    file = logging_dir.open(f"logs/task_{rank:05d}.log", "w")
    logger.add(file, colorize=False, level="DEBUG")
    return file


def _close_log(file: Any) -> None:
    logger.complete()
    logger.remove()
    file.close()


datatrove.executor.base.add_task_logger = _log_to_file
datatrove.executor.base.close_task_logger = _close_log
logger.remove()


class LocalStage(LocalPipelineExecutor):
    """Runs a stage in processes of this machine.

    datatrove's pool waits for ever for a process that was killed; this one says so.
    """

    def __init__(self, stage: Stage, places: Places, workers: int):
        super().__init__(
            list(stage.pipeline), len(stage.sizes), workers, str(places.log(stage.name)), start_method="spawn"
        )
        self._stage = stage

    def run(self) -> None:
        """Do all tasks that are not done yet.

        Raises:
            DataError: an input is unusable, or a process was killed.
        """
        todo = self.get_incomplete_ranks()
        with ByteProgress(self._stage.title, sum(self._stage.sizes)) as progress:
            progress.skip(sum(self._stage.sizes) - sum(self._stage.sizes[rank] for rank in todo))
            if self.workers == 1 or len(todo) < 2:
                for rank in todo:
                    self.run_task(rank)
                    progress.advance(self._stage.sizes[rank])
            else:
                self._run_in_processes(todo, progress)

    def run_task(self, rank: int) -> int:
        """Do one task, with steps that know nothing of others."""
        task = copy.copy(self)
        task.pipeline = copy.deepcopy(self.pipeline)
        task._run_for_rank(rank, rank)
        return rank

    def _run_in_processes(self, todo: Sequence[int], progress: ByteProgress) -> None:
        # Spawned, not forked: a fork while another thread holds a lock would hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(self.workers, len(todo)), context, _start_worker, (self,))
        try:
            for done in as_completed([pool.submit(_task_in_worker, rank) for rank in todo]):
                progress.advance(self._stage.sizes[done.result()])
        except BrokenProcessPool:
            raise WorkerKilledError(
                "a worker process was killed, most often for want of memory; start again with fewer --workers to go on"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_executor: LocalStage | None = None


def _start_worker(executor: LocalStage) -> None:
    global _executor
    _executor = executor
    threading.Thread(target=end_with_parent, daemon=True).start()


def _task_in_worker(rank: int) -> int:
    assert _executor is not None, "the pool's initializer has run"
    return _executor.run_task(rank)


@dataclass(frozen=True)
class SlurmOptions:
    """How Slurm is to run the stages.

    Attributes:
        partition: of the jobs.
        time: limit of each, as sbatch takes it.
        workers: how many tasks run at once; -1: no limit.
        tasks_per_job: tasks that one job does, one after the other.
        memory_gb: of each job.
        arguments: further `name=value` arguments of sbatch (without dashes).
        setup: shell command before each task, e.g. to load modules.
        print_only: write the batch files and print them, submit nothing.
    """

    partition: str
    time: str = "12:00:00"
    workers: int = -1
    tasks_per_job: int = 1
    memory_gb: int = 4
    arguments: Sequence[str] = ()
    setup: str = ""
    print_only: bool = False


class SlurmStage(SlurmPipelineExecutor):
    """Runs a stage as an array of Slurm jobs, after the one before.

    datatrove's jobs unpickle the executor; these build it anew from the plan in the work folder, and no pickle stays.
    """

    def __init__(self, stage: Stage, places: Places, options: SlurmOptions, depends: "SlurmStage | None" = None):
        extra = {"kill-on-invalid-dep": "yes", **dict(argument.partition("=")[::2] for argument in options.arguments)}
        super().__init__(
            list(stage.pipeline),
            tasks=len(stage.sizes),
            time=options.time,
            partition=options.partition,
            mem_per_cpu_gb=options.memory_gb,
            workers=options.workers,
            job_name=f"megagpt-{stage.name}",
            qos=extra.pop("qos", ""),
            env_command=options.setup or None,
            sbatch_args=extra,
            depends=depends,
            logging_dir=str(places.log(stage.name)),
            slurm_logs_folder=str(places.log(stage.name) / "slurm"),
            tasks_per_job=options.tasks_per_job,
            max_array_size=1000,
        )
        self._places, self._stage_name = places, stage.name

    def get_launch_file_contents(self, sbatch_args: dict, run_script: str) -> str:
        """A batch file which runs our command instead of datatrove's."""
        command = f"srun -l -n 1 {sys.executable} -m megagpt.cleaning.task {self._places.work} {self._stage_name}"
        return super().get_launch_file_contents(sbatch_args, command)

    def launch_merge_stats(self) -> None:
        """The statistics are put together by the last job."""

    def launch_job(self) -> None:
        """Submit the tasks that are not done yet.

        Raises:
            DataError: sbatch cannot be run, or refuses the job.
        """
        try:
            super().launch_job()
        except FileNotFoundError:
            raise DataError("sbatch is not on PATH; run this on a login node, or without --slurm") from None
        except subprocess.CalledProcessError:
            raise DataError(
                f"sbatch refused the job of stage {self._stage_name}, see above; mend --slurm or --sbatch"
            ) from None
        finally:
            (self._places.log(self._stage_name) / "executor.pik").unlink(missing_ok=True)

    def batch_file(self) -> str:
        """What `launch_job` would submit."""
        todo = self.get_incomplete_ranks()
        jobs = -(-len(todo) // self.tasks_per_job)
        return self.get_launch_file_contents(self.get_sbatch_args(max(min(jobs, self.max_array_size), 1)), "")


def jobs_at_work(job_ids: Sequence[str]) -> list[str]:
    """Those of the jobs that are waiting or running.

    Raises:
        DataError: Slurm cannot be asked.
    """
    if not job_ids:
        return []
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(job_ids)}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise DataError(f"jobs {', '.join(job_ids)} may be at work, and squeue does not answer ({error})") from None
    # It fails if it has forgotten all of them.
    return sorted(set(found.stdout.split()))


def run_locally(stages: Sequence[Stage], places: Places, workers: int) -> None:
    """Run all stages here, one after the other.

    Raises:
        DataError: an input is unusable, or a process was killed.
    """
    for stage in stages:
        LocalStage(stage, places, workers).run()


def submit(
    stages: Sequence[Stage], places: Places, options: SlurmOptions, note: Callable[[list[str]], None]
) -> list[str]:
    """Have Slurm run all stages, each after the one before.

    Args:
        stages: the stages; the last one puts the output together.
        places: of the work folder.
        options: of Slurm.
        note: called with the jobs after each submission.

    Returns:
        The batch files if they are only to be printed, else the numbers of the jobs.

    Raises:
        DataError: sbatch cannot be run, or refuses a job.
    """
    before: SlurmStage | None = None
    results: list[str] = []
    for stage in stages:
        executor = SlurmStage(stage, places, options, before)
        if options.print_only:
            results.append(executor.batch_file())
            continue
        executor.launch_job()
        if executor.job_id != -1:
            results.append(str(executor.job_id))
            note(results)
        before = executor
    return results
