"""A run whose disk fills up or becomes read-only while it saves: the last good checkpoint stays whole, the error is
clear, and with room it goes on. The disk is a small tmpfs, which takes root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, tiny_plan, train_quietly

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def train_on(plan, disk: Path, fault: str) -> int:
    """Train; the fault comes when rank 0 is about to write its file of step 4."""
    import megagpt.checkpoint.checkpoints as module

    write, prepare = module.write_tensors, module.Checkpoints._prepare

    def write_on_a_full_disk(path, tensors):
        if "step-00000004" in str(path) and path.name.startswith("rank-00000") and fault == "full":
            fill(disk / "filler")
        return write(path, tensors)

    def prepare_on_a_read_only_disk(self, temporary, needed):
        if "step-00000004" in str(temporary) and fault == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        prepare(self, temporary, needed)

    module.write_tensors, module.Checkpoints._prepare = write_on_a_full_disk, prepare_on_a_read_only_disk
    return train_quietly(plan)


@pytest.mark.parametrize(("fault", "words"), [("full", "No space left on device"), ("read-only", "Read-only file")])
def test_the_last_good_checkpoint_stays_and_the_run_goes_on_with_room(disk, dataset, tmp_path, fault, words):
    from megagpt.checkpoint import CheckpointReader, list_checkpoints

    sections = {
        "model": {"vocab_size": 300},
        "data": dataset,
        "checkpoint": {"directory": str(disk / "checkpoints"), "save_interval": 2, "keep_last": 1},
        "logging": {"directory": str(tmp_path / "logs")},
    }
    plan = tiny_plan("llama", ADAM, tp=2, pp=2, steps=6, sections=sections)
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train_on, 4, plan, disk, fault)
    said = str(failure.value)
    assert f"CheckpointError: {disk}/checkpoints/step-00000004: could not be saved (rank 0: " in said
    assert words in said
    assert "; free space or mend the folder, then start again" in said
    assert "is gone" not in said
    (good,) = list_checkpoints(disk / "checkpoints")
    assert good.name == "step-00000002"
    assert CheckpointReader(good).problems() == []
    assert (disk / "checkpoints" / "latest").read_text() == "step-00000002\n"
    if fault == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "filler").unlink(missing_ok=True)
    assert run_ranks(train_quietly, 4, plan) == [0] * 4
    assert list_checkpoints(disk / "checkpoints")[0].name == "step-00000006"
