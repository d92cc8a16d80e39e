"""Freed memory is used again: the next tensor of the same size costs no page faults."""

import resource
import sys

import pytest
import torch
from ranks import in_own_process


def faults_of_ten_tensors() -> int:
    """Pages that the system had to find for ten tensors of 128 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
@in_own_process
def test_freed_memory_is_used_again():
    from megagpt.parallel.cpu_memory import keep_freed_memory

    assert keep_freed_memory()
    faults_of_ten_tensors()
    pages = 10 * (1 << 27) // resource.getpagesize()
    assert faults_of_ten_tensors() < pages / 100


@in_own_process
def test_a_user_who_tunes_malloc_is_left_alone():
    import os

    from megagpt.parallel.cpu_memory import keep_freed_memory

    os.environ["MALLOC_MMAP_MAX_"] = "65536"
    assert not keep_freed_memory()
