"""Text files to a cleaned corpus: OUTPUT with JSONL files, and OUTPUT.report beside it.

Unfinished work is in OUTPUT.work, where a job that was killed goes on. What stands under the final names is whole.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.cleaning import filters
from megagpt.cleaning.executors import SlurmOptions, jobs_at_work, run_locally, submit
from megagpt.cleaning.finish import check_shards, finish
from megagpt.cleaning.recipe import Evaluation, Recipe, flatten
from megagpt.cleaning.report import Report, read_report
from megagpt.cleaning.stages import Places, Stage, build_stages
from megagpt.data.documents import iter_texts
from megagpt.data.encode import OnBadLine
from megagpt.data.files import sha256_of_file, write_whole
from megagpt.data.inputs import Format, find_inputs
from megagpt.data.work import Plan, WorkFolder, plan_units
from megagpt.data.workers import WorkerKilledError, unit_bytes
from megagpt.errors import DataError


@dataclass(frozen=True)
class Job:
    """What to make of what.

    Attributes:
        inputs: files, folders and globs.
        output: folder to write.
        recipe: what is done with each document.
        text_key: key (or column) of the text; the other fields stay as they are.
        on_bad_line: what to do with a line (row, file) that is no document: "error" or "skip".
        input_format: what the inputs hold, whatever their names say.
        compression: of the output's files: "gz", "zst" or "none".
        overwrite: replace an output of another recipe or inputs.
    """

    inputs: Sequence[str | Path]
    output: str | Path
    recipe: Recipe
    text_key: str = "text"
    on_bad_line: OnBadLine = "error"
    input_format: Format | None = None
    compression: str = "gz"
    overwrite: bool = False


def run_job(job: Job, *, workers: int = 1, slurm: SlurmOptions | None = None) -> Report | list[str]:
    """Make a cleaned corpus. What users should know goes to stderr.

    Args:
        job: what to make.
        workers: processes; the result does not depend on it.
        slurm: have Slurm run it instead.

    Returns:
        The report; with Slurm the numbers of its jobs, or their batch files (see `SlurmOptions.print_only`).

    Raises:
        DataError: an input or line cannot be used, the output exists with another recipe, another job is at work on it,
            no document is left, or nothing can be written.
    """
    if workers < 1:
        raise DataError(f"workers={workers} must be 1 or more")
    plan = _plan(job)
    if (existing := _existing(job, plan)) is not None:
        return existing
    folder = WorkFolder(Path(job.output).absolute())  # Slurm's jobs may start elsewhere
    is_new = not folder.path.exists()
    try:
        with folder.taken_by(0, plan) as (plan, notice):
            _tell(notice)
            _refuse_beside_slurm(folder)
            try:
                return _run(plan, folder, job.recipe, workers, slurm)
            except WorkerKilledError:
                raise
            except DataError:
                # With an input that must be mended, what was done so far is of no use.
                if slurm is None:
                    folder.remove()
                raise
            finally:
                if is_new and slurm is not None and slurm.print_only:
                    folder.remove()
    except OSError as error:
        raise DataError(
            f"{job.output} cannot be written ({error.strerror or error}); free space or choose another --output, and"
            " start again to go on"
        ) from error


def _tell(notice: str) -> None:
    if notice:
        print(notice, file=sys.stderr, flush=True)


def _plan(job: Job) -> Plan:
    inputs = find_inputs(job.inputs, job.input_format)
    identity: dict[str, Any] = flatten(job.recipe)
    identity |= {"text_key": job.text_key, "on_bad_line": job.on_bad_line, "compression": job.compression}
    if job.recipe.evaluation is not None:
        files = find_inputs(job.recipe.evaluation.texts)
        identity["evaluation_files"] = [[file.path, sha256_of_file(Path(file.path))] for file in files]
    return Plan(identity, inputs, plan_units(inputs), world_size=1)


def _existing(job: Job, plan: Plan) -> Report | None:
    """The report of a complete output of the same things; None if there is none, or it is to be replaced.

    Raises:
        DataError: there is an output of other things.
    """
    output = Path(job.output)
    report = read_report(output)
    if not output.exists():
        return None
    if report is None:
        if WorkFolder(output).path.exists():  # a job was killed at the very end
            return None
        raise DataError(f"{output} exists and was not made by this command; choose another --output")
    changed = [
        f"{key}: {report.identity.get(key)} before, {plan.identity.get(key)} now"
        for key in {**plan.identity, **report.identity}
        if report.identity.get(key) != plan.identity.get(key)
    ]
    if not changed and report.inputs != tuple(asdict(source) for source in plan.inputs):
        changed = ["the inputs have changed"]
    if not changed and (damage := check_shards(output, report.shards)):
        changed = [damage]
    if job.overwrite and changed:
        return None
    if changed:
        raise DataError(
            f"{output} exists and was made differently ({', '.join(changed)}); pass --overwrite to replace it, or"
            " choose another --output"
        )
    WorkFolder(output).remove()
    _tell(f"{output} is complete already, of the same inputs and recipe: nothing to do")
    return report


def stages_of(plan: Plan, folder: WorkFolder) -> list[Stage]:
    """The stages of a plan (without `finish`)."""
    return build_stages(plan, folder.path, unit_bytes(plan))


def _run(
    plan: Plan, folder: WorkFolder, recipe: Recipe, workers: int, slurm: SlurmOptions | None
) -> Report | list[str]:
    places = Places(folder.path)
    if recipe.evaluation is not None:
        _index_evaluation(recipe.evaluation, places)
    stages = stages_of(plan, folder)
    if slurm is None:
        run_locally(stages, places, workers)
        return finish(plan, folder.path)
    if not slurm.print_only:
        note_jobs(folder.path, [], slurm)
    last = Stage("finish", "", [], [1])
    return submit([*stages, last], places, slurm, lambda jobs: note_jobs(folder.path, jobs, slurm))


def _index_evaluation(options: Evaluation, places: Places) -> None:
    def texts() -> Iterator[str]:
        for key in options.keys:
            yield from iter_texts(options.texts, key)

    number, short = filters.index_evaluation(options, texts(), places.evaluation / "texts.index.hashes")
    _tell(f"evaluation: {number:,} texts; {short:,} of them cannot be found (fewer than {options.n_grams} words)")


def note_jobs(work: Path, jobs: Sequence[str], options: SlurmOptions) -> None:
    """Write down which jobs are at work, and how they were started; nothing if they are through already."""
    if work.is_dir():
        write_whole(work / "slurm.json", json.dumps({"jobs": list(jobs), "options": asdict(options)}).encode())


def noted_jobs(work: Path) -> tuple[list[str], SlurmOptions] | None:
    """What `note_jobs` has written, if it has."""
    try:
        content = json.loads((work / "slurm.json").read_bytes())
    except FileNotFoundError:
        return None
    return content["jobs"], SlurmOptions(**content["options"])


def _refuse_beside_slurm(folder: WorkFolder) -> None:
    """Two jobs must not work in one folder.

    Raises:
        DataError: jobs of Slurm may be at work.
    """
    noted = noted_jobs(folder.path)
    if noted is not None and (busy := jobs_at_work(noted[0])):
        raise DataError(
            f"{folder.path}: jobs {', '.join(busy)} are at work on it; wait for them, or scancel {' '.join(busy)}"
        )
