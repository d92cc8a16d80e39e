"""When the batch files of pre-training have their job queued again."""

from pathlib import Path

import pytest
from batch_files import DEEPSPEED, PRETRAIN, STUBS, calls, submit

UNFINISHED = ("run.yaml", "ds.json", "checkpoint.directory=runs", "training.steps=9")


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
def test_an_unfinished_run_is_queued_again_for_which_the_batch_file_outlives_a_signal(folder: Path, path: Path) -> None:
    result = submit(folder, path, *UNFINISHED)
    assert result.returncode == 0, result.stderr
    assert "job 123456 is queued again and goes on from step 0\n" in result.stdout
    assert calls(folder)[-1] == "scontrol requeue 123456"


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
@pytest.mark.parametrize(("ranks", "status"), [("0", 75), ("7", 7)])
def test_an_unfinished_run_ends_in_an_error_if_it_is_not_queued_again(
    folder: Path, path: Path, ranks: str, status: int
) -> None:
    result = submit(folder, path, *UNFINISHED, SRUN_EXITS=ranks, REQUEUE="no")
    assert result.returncode == status, result.stderr
    assert "the run has come to step 0 of 9; submit it again, and it goes on from there\n" in result.stdout
    assert calls(folder)[-1] == "srun"


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
def test_a_finished_run_may_be_started_as_often_as_one_asks(folder: Path, path: Path) -> None:
    (folder / "checkpoints" / "step-00000003" / "manifest.sha256").touch()
    for _ in range(2):
        result = submit(folder, path, "run.yaml", "ds.json", "checkpoint.directory=checkpoints", MAX_IDLE_STARTS="1")
        assert result.returncode == 0, result.stderr
        assert "the run is finished at step 3\n" in result.stdout
        assert "srun" in calls(folder), "its ranks see whether the last checkpoint is whole"


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
@pytest.mark.parametrize("tool", ["plan.py", "restarts.py begin"])
def test_what_passes_by_itself_before_the_ranks_start_has_the_job_queued_again(
    folder: Path, path: Path, tool: str
) -> None:
    away = f'if [[ $* == tools/"{tool}"* ]]; then exit 75; fi'
    (folder / "bin" / "python").write_text(f"#!/bin/bash\n{away}\n{STUBS['python']}\n")
    result = submit(folder, path, *UNFINISHED)
    assert result.returncode == 0, result.stderr
    assert "job 123456 is queued again and goes on from step 0\n" in result.stdout
    assert "srun" not in calls(folder)


def test_what_would_not_help_is_not_started_again(folder: Path) -> None:
    result = submit(folder, PRETRAIN, *UNFINISHED, SRUN_EXITS="2")
    assert (result.returncode, "not started again: the error is one to be mended\n" in result.stdout) == (2, True)
    result = submit(folder, PRETRAIN, *UNFINISHED, MAX_IDLE_STARTS="1")
    assert (result.returncode, calls(folder)[-1]) == (2, "srun")
    assert "the last 1 starts of this job all began at step 0" in result.stderr
