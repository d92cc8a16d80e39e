"""How many files and sockets a rank may have open, and how many it has."""

import os
import resource
import threading
import time

import pytest
from ranks import run_ranks
from tiny import ADAM, tiny_plan, train_quietly

from megagpt.errors import ConfigError
from megagpt.parallel.open_files import needed_files


def limits_after_a_start() -> tuple[int, int]:
    from megagpt import train

    resource.setrlimit(resource.RLIMIT_NOFILE, (600, 5000))
    train.parse_arguments = lambda arguments=None: train.argparse.Namespace(
        config="/missing.yaml", deepspeed_config="", overrides=[], verbose=False
    )
    with pytest.raises(ConfigError):
        train.main()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_run_raises_its_limit() -> None:
    assert run_ranks(limits_after_a_start, 1) == [(5000, 5000)]


def most_open_files(plan) -> int:
    most, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.is_set():
            most = max(most, len(os.listdir("/proc/self/fd")))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    train_quietly(plan)
    is_over.set()
    watcher.join()
    return most


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"dp": 4}])
def test_a_run_has_no_more_open_than_foreseen(dataset, tmp_path, layout: dict[str, int]) -> None:
    folders = {"checkpoint": {"directory": str(tmp_path / "c")}, "logging": {"directory": str(tmp_path / "l")}}
    plan = tiny_plan(
        "llama", ADAM, steps=2, sections={"model": {"vocab_size": 300}, "data": dataset, **folders}, **layout
    )
    assert max(run_ranks(most_open_files, 4, plan)) <= needed_files(plan, on_gpus=False)


def test_what_is_foreseen_grows_with_the_run() -> None:
    sizes = [tiny_plan("llama", ADAM, dp=dp).world_size for dp in (1, 2, 4)]
    needs = [needed_files(tiny_plan("llama", ADAM, dp=dp), on_gpus=True) for dp in (1, 2, 4)]
    assert sizes == [1, 2, 4]
    assert needs[2] - needs[1] == 2 * (needs[1] - needs[0]) == 2 * 10
