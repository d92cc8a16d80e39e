"""The folder for an optimizer on a disk: what is wrong is told before any work, and what dead runs left is removed."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, tiny_plan

from megagpt.errors import ConfigError

pytestmark = pytest.mark.usefixtures("libraries")


def plan_on(folder: Path, **layout):
    section = {"device": "nvme", "nvme_path": str(folder)}
    return tiny_plan("llama", ADAM, zero=3, deepspeed={"zero_optimization": {"offload_optimizer": section}}, **layout)


ALONE = SimpleNamespace(rank=0, pipeline_rank=0, gather_objects=lambda value: [value])


@pytest.fixture
def async_io(libraries, monkeypatch) -> None:
    """An extension that loads, for tests that do without it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self: None)


def problem_of(plan, ranks=ALONE) -> str:
    from megagpt.engine.swap_folder import prepare_swap_folder

    with pytest.raises(ConfigError) as caught:
        prepare_swap_folder(plan, ranks)
    return str(caught.value)


# A host with GPUs and no CUDA toolkit: DeepSpeed joins CUDA_HOME, which is None, to a path.
@pytest.mark.parametrize("error", [RuntimeError("Unable to JIT load the async_io op"), TypeError("not NoneType")])
def test_a_host_without_the_extension_is_told_what_to_install(tmp_path, monkeypatch, error):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def fail(self):
        raise error

    monkeypatch.setattr(AsyncIOBuilder, "load", fail)
    words = problem_of(plan_on(tmp_path))
    assert 'offload_optimizer.device="nvme" needs DeepSpeed\'s extension async_io' in words
    assert f"({error}); install libaio" in words
    assert "apt install libaio-dev" in words
    assert "CUDA" not in words, "this host has no GPU"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_missing_or_none_is_refused(async_io, tmp_path):
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    for path, reason in ((missing, "No such file or directory"), (file, "Not a directory")):
        words = problem_of(plan_on(path))
        assert f"zero_optimization.offload_optimizer.nvme_path={path} cannot be used on host" in words
        assert f"({reason}); give a folder" in words


def test_a_file_system_without_direct_io_is_refused(async_io, tmp_path, monkeypatch):
    from megagpt.engine import swap_folder

    def refuse(path):
        raise OSError(22, "Invalid argument", str(path))

    monkeypatch.setattr(swap_folder, "_write_directly", refuse)
    assert "(Invalid argument); give a folder" in problem_of(plan_on(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_for_the_ranks_of_its_host_is_refused(async_io, tmp_path, monkeypatch):
    from megagpt.engine import swap_folder

    plan = plan_on(tmp_path, dp=2)
    together = 2 * plan.memory.disk
    usage = collections.namedtuple("usage", "total used free")
    two = SimpleNamespace(rank=0, pipeline_rank=0, gather_objects=lambda value: [value, value])
    monkeypatch.setattr(swap_folder.shutil, "disk_usage", lambda path: usage(0, 0, together - 1))
    assert f"nvme_path={tmp_path}: " in (words := problem_of(plan, two))
    assert "GB are free on host" in words
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(swap_folder.shutil, "disk_usage", lambda path: usage(0, 0, together))
    folder = swap_folder.prepare_swap_folder(plan, two)
    assert os.listdir(tmp_path) == [folder.path.name]
    folder.remove()
    assert os.listdir(tmp_path) == []


def build(plan) -> None:
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    build_engine(plan, start_ranks(plan, detect_launch()))


def test_all_ranks_end_with_the_same_message(async_io, tmp_path):
    with pytest.raises(RankFailedError) as caught:
        run_ranks(build, 2, plan_on(tmp_path / "missing", dp=2))
    assert str(caught.value).count("ConfigError: DeepSpeed config: zero_optimization.offload_optimizer.nvme_path=") == 2


HOLD = """
import sys, time
from pathlib import Path
from megagpt.engine.swap_folder import SwapFolder
folder = SwapFolder(Path(sys.argv[1]))
(folder.path / "zero_stage_3").mkdir()
print(folder.path, flush=True)
time.sleep(300 if sys.argv[2] == "wait" else 0)
"""


def test_what_a_killed_run_left_is_removed_by_the_next_one_and_a_living_one_keeps_its_own(tmp_path):
    from megagpt.engine.swap_folder import SwapFolder, remove_dead_folders

    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        mine = SwapFolder(tmp_path)
        remove_dead_folders(tmp_path)
        assert {path.name, mine.path.name} == set(os.listdir(tmp_path))
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while path.exists() and time.monotonic() < deadline:
        remove_dead_folders(tmp_path)
    assert os.listdir(tmp_path) == [mine.path.name]
    mine.remove()
    subprocess.run([*command, "end"], check=True, stdout=subprocess.PIPE)
    assert os.listdir(tmp_path) == [], "an interpreter that ends removes it"
