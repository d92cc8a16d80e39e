"""What a Slurm job of `tools/clean_data.py` runs: `python -m megagpt.cleaning.task WORK STAGE`."""

import sys
from pathlib import Path

from megagpt.cleaning.executors import SlurmStage
from megagpt.cleaning.finish import finish
from megagpt.cleaning.job import noted_jobs, stages_of
from megagpt.cleaning.report import table
from megagpt.cleaning.stages import Places
from megagpt.data.work import WorkFolder
from megagpt.errors import DataError, run_command


def main() -> None:
    """Do the tasks of a stage that Slurm's environment names, or put the output together."""
    work, name = sys.argv[1:]
    folder = WorkFolder(work.removesuffix(".work"))
    plan = folder.read_plan()
    if plan is None:
        raise DataError(f"{work} holds no plan; was the job's folder removed?")
    if name == "finish":
        print(table(finish(plan, Path(work))))
        return
    (stage,) = (stage for stage in stages_of(plan, folder) if stage.name == name)
    noted = noted_jobs(folder.path)
    if noted is None:
        raise DataError(f"{work} holds no slurm.json; submit again with tools/clean_data.py")
    SlurmStage(stage, Places(folder.path), noted[1]).run()


if __name__ == "__main__":
    run_command(main)
