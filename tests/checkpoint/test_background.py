"""Saves beside training: what is written is the state of the step, failures stop all ranks, little is deleted."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from stepped import SteppedRun, plan_in

pytestmark = pytest.mark.usefixtures("libraries")


def slow_writes(until: threading.Event) -> None:
    """Make each write of this process wait for an event."""
    import megagpt.checkpoint.checkpoints as module

    write = module.write_tensors

    def write_late(path, tensors):
        assert until.wait(60)
        return write(path, tensors)

    module.write_tensors = write_late


def save_while_training_goes_on(plan) -> tuple[bool, list[int]]:
    """Save step 1 in the background, write it only after two more steps, then save step 3."""
    run, told, may_write = SteppedRun(plan), [], threading.Event()
    run.checkpoints.on_saved = lambda saved: told.append(saved.step)
    run.step()
    slow_writes(may_write)
    run.save()
    before = (Path(plan.run.checkpoint.directory) / "step-00000001").exists()
    for _ in range(2):
        run.step()
    assert told == []
    may_write.set()
    run.save()  # waits for the first
    assert told == [1]
    run.checkpoints.wait()
    return before, told


def test_what_is_written_is_the_state_of_its_step(tmp_path):
    layout = {"tp": 2, "dp": 2, "zero": 2, "dropout": 0.1}
    plan = plan_in(tmp_path / "late", **layout, checkpoint={"keep_last": 9})
    for before, told in run_ranks(save_while_training_goes_on, 4, plan):
        assert not before, "it was not there yet when training went on"
        assert told == [1, 3]
    run_ranks(save_at_once, 4, plan_in(tmp_path / "at_once", **layout, checkpoint={"asynchronous": False}))
    for name in [f"rank-{rank:05d}.safetensors" for rank in range(4)] + ["probe.safetensors"]:
        late, at_once = (tmp_path / where / "step-00000001" / name for where in ("late", "at_once"))
        assert late.read_bytes() == at_once.read_bytes()
    assert (tmp_path / "late" / "latest").read_text() == "step-00000003\n"


def save_at_once(plan) -> None:
    run = SteppedRun(plan)
    run.step()
    run.save()


def fail_in_the_background(plan, number: int) -> tuple[int, str, int]:
    """The step, the words and the exit status with which this rank learns that rank 1 could not write."""
    import megagpt.checkpoint.checkpoints as module
    from megagpt.errors import CheckpointError

    run = SteppedRun(plan)
    run.step()
    run.save()
    run.checkpoints.wait()
    if os.environ["RANK"] == "1":

        def failing_disk(path, tensors):
            raise OSError(number, os.strerror(number), str(path))

        module.write_tensors = failing_disk
    run.step()
    run.save()
    for _ in range(200):
        try:
            run.step()
        except CheckpointError as error:
            return run.state.step, str(error), error.exit_code
        time.sleep(0.01)
    return 0, "nothing was said", 0


@pytest.mark.parametrize(
    ("number", "advice", "status"),
    [(errno.ENOSPC, "free space or mend the folder, then", 2), (errno.EIO, "this may pass by itself:", 75)],
)
def test_a_failure_in_the_background_stops_all_ranks_at_the_same_step(tmp_path, number, advice, status):
    outcomes = run_ranks(fail_in_the_background, 2, plan_in(tmp_path, pp=2), number)
    assert len({step for step, *_ in outcomes}) == 1
    assert outcomes[0][0] > 2
    for _, said, exit_code in outcomes:
        assert f"step-00000002: could not be saved (rank 1: [Errno {number}] {os.strerror(number)}" in said
        assert f"; {advice} start again" in said
        assert exit_code == status, "of a process that is to be started again, or not"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step-")) == ["step-00000001"]


def save_on_a_small_disk(plan, free: int) -> str:
    from types import SimpleNamespace

    import megagpt.checkpoint.checkpoints as module
    from megagpt.errors import CheckpointError

    module.shutil.disk_usage = lambda path: SimpleNamespace(free=free)
    run = SteppedRun(plan)
    run.step()
    run.save()
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return ""


def test_too_little_space_is_told_before_anything_is_written(tmp_path):
    said = run_ranks(save_on_a_small_disk, 2, plan_in(tmp_path, dp=2), 2_000_000)
    assert said[0] == said[1]
    assert "GB are needed and 0.002 GB are free" in said[0]
    assert list(tmp_path.iterdir()) == []


def save_beyond_a_limit(plan) -> str:
    """The limit on a file's size stands for a disk that fills up while it is written to."""
    import resource

    from megagpt.errors import CheckpointError

    run = SteppedRun(plan)
    run.step()
    run.save()
    run.checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    run.step()
    run.save()
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return "nothing was said"


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(tmp_path):
    from megagpt.checkpoint import CheckpointReader

    for said in run_ranks(save_beyond_a_limit, 2, plan_in(tmp_path, tp=2)):
        assert "step-00000002: could not be saved (rank 0: [Errno 27] File too large" in said
        assert "rank 1: [Errno 27]" in said
        assert "; free space or mend the folder, then start again" in said
    assert CheckpointReader(tmp_path / "step-00000001").problems() == []
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    assert kept(tmp_path) == [1]
    assert not list(tmp_path.glob(".*")), "what there was of the other one takes no space"


def train_and_stop(plan) -> None:
    run, may_write = SteppedRun(plan), threading.Event()
    run.step()
    slow_writes(may_write)
    run.save()
    threading.Timer(0.3, may_write.set).start()
    run.checkpoints.close()


def test_leaving_waits_for_the_save_in_flight(tmp_path):
    run_ranks(train_and_stop, 2, plan_in(tmp_path, pp=2))
    assert (tmp_path / "step-00000001" / "manifest.sha256").exists()


def save_eight(plan, losses: dict[int, float]) -> None:
    run = SteppedRun(plan)
    for step in range(1, 9):
        run.step()
        if step in losses:
            run.save(validation_loss=losses[step])
        else:
            run.save()
        run.checkpoints.wait()
        if step == 2:
            (Path(plan.run.checkpoint.directory) / "step-00000002" / "pinned").touch()


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_newest_the_periodic_the_best_and_the_pinned_stay(tmp_path):
    (tmp_path / ".step-00000007.tmp").mkdir()
    (tmp_path / ".removed-step-00000001").mkdir()
    plan = plan_in(tmp_path, checkpoint={"keep_every": 5, "keep_best": 1})
    run_ranks(save_eight, 1, plan, {1: 5.0, 3: 4.0, 4: 4.5, 6: 4.2})
    assert kept(tmp_path) == [2, 3, 5, 7, 8]
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    assert (tmp_path / "latest").read_text() == "step-00000008\n"
    assert not list(tmp_path.glob(".*")), "what killed runs had left is gone"


def test_only_the_newest_stay_if_nothing_else_is_asked_for(tmp_path):
    run_ranks(save_eight, 1, plan_in(tmp_path, checkpoint={"keep_best": 0}), {1: 5.0, 3: 4.0})
    assert kept(tmp_path) == [2, 7, 8]
