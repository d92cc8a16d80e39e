"""Checkpoints in an object store, a real S3 server: complete or not there, kept, found damaged, resumed from."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from stepped import SteppedRun, plan_in
from tiny import ADAM, tiny_plan, train_quietly

from megagpt.storage import filesystem, location

pytestmark = pytest.mark.usefixtures("libraries")


def names(url: str) -> list[str]:
    return sorted(path.name for path in location(url).iterdir())


# ------------------------------------------------------------------------------------------------- save and resume


def save_two_then_train(plan) -> list[float]:
    """Losses after the second save."""
    run = SteppedRun(plan)
    for _ in range(2):
        run.step()
        run.save()
    losses = [run.step() for _ in range(2)]
    run.checkpoints.wait()
    return losses


def resume_and_train(plan) -> list[float]:
    run = SteppedRun(plan)
    run.resume()
    return [run.step() for _ in range(2)]


@pytest.fixture(scope="module")
def remote(libraries, store) -> tuple[str, list[float]]:
    """The directory of two checkpoints that 2 x 2 ranks wrote, and the losses of the next two steps."""
    directory = f"{store.new_bucket()}/run"
    losses = run_ranks(save_two_then_train, 4, plan_in(directory, tp=2, dp=2, zero=2))
    return directory, losses[0]


def test_the_same_bytes_are_written_as_on_a_disk(remote, tmp_path):
    run_ranks(save_two_then_train, 4, plan_in(str(tmp_path), tp=2, dp=2, zero=2))
    assert names(remote[0]) == ["latest", "step-00000001", "step-00000002"]
    assert (location(remote[0]) / "latest").read_text() == "step-00000002\n"
    here, there = tmp_path / "step-00000002", location(remote[0]) / "step-00000002"
    files = sorted(path.name for path in here.iterdir())
    assert names(str(there)) == files
    for name in files:
        if name.endswith(".safetensors"):
            assert (there / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.parametrize(("world", "layout"), [(4, {"tp": 2, "dp": 2, "zero": 2}), (2, {"pp": 2})])
def test_a_run_goes_on_from_there_on_any_layout(remote, world, layout):
    losses = run_ranks(resume_and_train, world, plan_in(remote[0], **layout))[0]
    assert losses == pytest.approx(remote[1], abs=0 if "tp" in layout else 1e-5)


def test_a_part_is_read_without_the_rest(remote, monkeypatch):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.storage import transfer

    monkeypatch.setattr(transfer, "_AHEAD_BYTES", 1)  # these files are small
    read = []

    def counted(url: str, method: str, *args, **options):
        content = filesystem.call(url, method, *args, **options)
        if method == "cat_file":
            read.append(len(content))
        return content

    monkeypatch.setattr(transfer, "call", counted)
    reader = CheckpointReader(location(remote[0]) / "step-00000002")
    assert reader.problems(with_hash=False) == []
    headers = sum(read)
    reader.full("layers.0.mlp.linear_fc1.weight")
    needed = 4 * 2 * reader.run.model.ffn_hidden_size * reader.run.model.hidden_size
    assert sum(read) - headers == needed


def test_tools_take_the_url(remote, capsys, monkeypatch):
    import runpy
    import sys

    tool = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
    monkeypatch.setattr(sys, "argv", [str(tool), remote[0], "--verify"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert "step-00000002  16" in said
    assert "2 of 2 checkpoints are intact" in said
    assert "never-to-be-printed" not in said


# ------------------------------------------------------------------------------------------------- kill and resume


def kill_before_the_last_object(plan) -> int:
    """Train until the manifest of step 4 is to be written."""
    import megagpt.checkpoint.checkpoints as module

    write = module.write_manifest

    def killed(folder, manifest) -> None:
        if manifest.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, manifest)

    module.write_manifest = killed
    return train_quietly(plan)


def train_plan(directory: str, logs: Path, dataset: dict):
    sections = {
        "model": {"vocab_size": 300},
        "data": dataset,
        "checkpoint": {"directory": directory, "save_interval": 2},
        "logging": {"directory": str(logs), "interval": 1},
    }
    return tiny_plan("llama", ADAM, pp=2, dropout=0.1, steps=6, sections=sections)


def curve(logs: Path) -> list[tuple]:
    records = map(json.loads, (logs / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["split"] == "train"]


def test_a_run_killed_while_it_saves_resumes_to_the_very_same_curve(bucket, dataset, tmp_path):
    run_ranks(train_quietly, 2, train_plan(str(tmp_path / "checkpoints"), tmp_path / "calm", dataset))
    plan = train_plan(f"{bucket}/run", tmp_path / "wild", dataset)
    with pytest.raises(RankFailedError, match="rank 0: killed"):
        run_ranks(kill_before_the_last_object, 2, plan)
    assert "rank-00001.safetensors" in names(f"{bucket}/run/step-00000004"), "it was in the middle of a save"
    assert run_ranks(train_quietly, 2, plan) == [0, 0]
    assert curve(tmp_path / "wild") == curve(tmp_path / "calm")
    assert [name for name in names(f"{bucket}/run") if name.startswith("step")] == ["step-00000004", "step-00000006"]
    assert "never-to-be-printed" not in (location(f"{bucket}/run/step-00000006/manifest.json")).read_text()


# ------------------------------------------------------------------------------------------------- damage and retention


def save_three(plan) -> None:
    run = SteppedRun(plan)
    for _ in range(3):
        run.step()
        run.save()
    run.checkpoints.wait()


def resumed_step(plan) -> int:
    run = SteppedRun(plan)
    run.resume()
    return run.state.step


def test_a_changed_object_is_found_and_set_aside(bucket):
    plan = plan_in(f"{bucket}/run", checkpoint={"keep_last": 3})
    run_ranks(save_three, 1, plan)
    changed = location(f"{bucket}/run/step-00000003/rank-00000.safetensors")
    content = bytearray(changed.read_bytes())
    content[-1000] ^= 1
    changed.write_bytes(bytes(content))
    location(f"{bucket}/run/step-00000002/probe.safetensors").unlink()
    assert run_ranks(resumed_step, 1, plan) == [1]
    left = names(f"{bucket}/run")
    assert [name.rpartition("-")[0] for name in left[:2]] == ["damaged-step-00000002", "damaged-step-00000003"]
    assert left[2:] == ["latest", "step-00000001"]
    assert location(f"{bucket}/run/{left[1]}/rank-00000.safetensors").read_bytes() == bytes(content), "all is kept"


def save_eight(plan, losses: dict[int, float]) -> None:
    run = SteppedRun(plan)
    for step in range(1, 9):
        run.step()
        run.save(**({"validation_loss": losses[step]} if step in losses else {}))
        run.checkpoints.wait()
        if step == 2:
            (location(plan.run.checkpoint.directory) / "step-00000002" / "pinned").touch()


def test_the_newest_the_periodic_the_best_and_the_pinned_stay(bucket):
    from megagpt.checkpoint import list_checkpoints

    directory = location(f"{bucket}/run")
    (directory / "step-00000090" / "rank-00000.safetensors").write_bytes(b"of a run that was killed")
    assert list_checkpoints(directory) == []
    run_ranks(save_eight, 1, plan_in(str(directory), checkpoint={"keep_every": 5}), {1: 5.0, 3: 4.0, 4: 4.5, 6: 4.2})
    assert names(str(directory)) == ["best", "latest", *(f"step-0000000{step}" for step in (2, 3, 5, 7, 8))]
    assert (directory / "best").read_text() == "step-00000003\n"
    assert [folder.name for folder in list_checkpoints(directory)] == names(str(directory))[:1:-1]


# ------------------------------------------------------------------------------------------------- a store that is lost


def lose_patience() -> None:
    from megagpt.storage import transfer

    filesystem.ATTEMPTS, filesystem.REQUEST_SECONDS, filesystem.WHOLE_SECONDS = 1, 1.0, 1.0
    transfer._DISCARD_SECONDS = 0.5
    filesystem._known.clear()


def lose_the_store_while_saving(plan, server: int) -> tuple[int, str]:
    """The step and the words with which this rank learns that the store is gone."""
    from megagpt.errors import CheckpointError

    run = SteppedRun(plan)
    run.step()
    run.save()
    run.checkpoints.wait()
    lose_patience()
    if run.ranks.rank == 0:
        os.kill(server, signal.SIGSTOP)
    run.ranks.barrier()
    run.step()
    run.save()
    for _ in range(400):
        try:
            run.step()
        except CheckpointError as error:
            return run.state.step, str(error)
        time.sleep(0.02)
    return 0, "nothing was said"


def restore_without_the_store(plan) -> str:
    from megagpt.errors import StorageError

    lose_patience()
    try:
        SteppedRun(plan).resume()
    except StorageError as error:
        return str(error)
    return "nothing was said"


def test_a_store_that_is_lost_stops_all_ranks_and_costs_no_checkpoint(libraries, store, bucket):
    plan = plan_in(f"{bucket}/run", pp=2)
    try:
        outcomes = run_ranks(lose_the_store_while_saving, 2, plan, store.process_id)
        told = run_ranks(restore_without_the_store, 2, plan)
    finally:
        store.thaw()
    assert len({step for step, _ in outcomes}) == 1
    for _, said in outcomes:
        assert f"{bucket}/run/step-00000002: could not be saved (rank 0: {bucket}/run" in said
        assert "the store fails or cannot be reached" in said
        assert said.endswith("; this may pass by itself: start again")
    for said in told:
        assert f"{bucket}/run: the store fails or cannot be reached" in said
    assert run_ranks(resumed_step, 2, plan) == [1, 1], "nothing was taken for damaged"
