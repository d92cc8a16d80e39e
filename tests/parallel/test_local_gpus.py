"""Ranks on the GPUs of a host. No GPU is needed: which rank gets which is decided by the environment it starts with."""

import os

import pytest
from ranks import RankFailedError, run_ranks

from megagpt.errors import LaunchError
from megagpt.parallel.local_gpus import gpu_environments, visible_gpus


def test_each_rank_sees_one_gpu():
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in gpu_environments(["2", "5"], 2)] == ["2", "5"]
    assert not any("NCCL_HOSTID" in environment for environment in gpu_environments(["2", "5"], 2))


def test_ranks_that_share_a_gpu_take_each_other_for_another_host():
    environments = gpu_environments(["GPU-a"], 3)
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in environments} == {"GPU-a"}
    assert len({environment["NCCL_HOSTID"] for environment in environments}) == 3


def test_without_gpus_there_are_no_ranks():
    with pytest.raises(LaunchError, match="no GPU is visible; leave out --gpus"):
        gpu_environments([], 2)
    assert visible_gpus() == [], "the suite hides them"


def told(word: str) -> tuple[str, str, str, bool]:
    import sys

    return os.environ["RANK"], os.environ["COLOUR"], word, "torch" in sys.modules


def test_new_processes_begin_with_their_environments(libraries):
    found = run_ranks(told, 2, "hello", environments=[{"COLOUR": "red"}, {"COLOUR": "blue"}])
    assert found == [("0", "red", "hello", False), ("1", "blue", "hello", False)]


def fail(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ValueError("in the middle")


def test_what_a_new_process_raises_is_told():
    with pytest.raises(RankFailedError, match=r"(?s)rank 1: .*ValueError: in the middle"):
        run_ranks(fail, 2, "1", environments=[{}, {}])
