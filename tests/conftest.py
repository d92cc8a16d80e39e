"""Shared by all tests: one thread per process, quiet libraries, heavy imports once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest


@pytest.fixture(scope="session")
def libraries() -> None:
    """Import torch, DeepSpeed and Megatron-Core in the parent, so that forked ranks start at once."""
    from megagpt.parallel.console import quiet_libraries

    quiet_libraries(verbose=False)
    import torch

    torch.set_num_threads(1)
    from megagpt.parallel.without_cuda import prepare_deepspeed, support_hosts_without_cuda

    prepare_deepspeed()
    support_hosts_without_cuda()
    import megagpt.checkpoint
    import megagpt.engine
