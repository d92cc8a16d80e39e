"""Shared by all tests: one thread per process, quiet libraries, heavy imports once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GPUS_OF_THIS_HOST", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))  # for tests/verify
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked, and meet over gloo, on hosts with GPUs too

import pytest

if TYPE_CHECKING:
    from stores import Store


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
    import megagpt.engine  # noqa: F401


@pytest.fixture(scope="session")
def dataset(libraries, tmp_path_factory) -> dict[str, str]:
    """The `data` section of a tiny dataset with its tokenizer of 300 tokens."""
    from tiny import write_tiny_dataset

    prefix, tokenizer = write_tiny_dataset(tmp_path_factory.mktemp("data"))
    return {"prefix": prefix, "tokenizer": tokenizer}


@pytest.fixture(scope="session")
def store() -> Iterator["Store"]:
    """An S3 server on this machine, and the environment that leads to it."""
    from stores import Store

    with Store() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def bucket(store) -> str:
    """URL of a new bucket."""
    return store.new_bucket()


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory) -> Callable[[str], Path]:
    """Checkpoint folder of a model by name, trained for some steps in fp32: GPT-2 on CP2 x PP2, others on TP2 x PP2.

    Each is trained once.
    """
    from ranks import run_ranks
    from tiny import ADAM, tiny_plan, train_quietly

    folders: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in folders:
            directory = tmp_path_factory.mktemp(model) / "checkpoints"
            sections = {"model": {"vocab_size": 300}, "data": dataset, "checkpoint": {"directory": str(directory)}}
            layout = {"cp": 2, "pp": 2} if model == "gpt2" else {"tp": 2, "pp": 2}
            plan = tiny_plan(model, dict(ADAM, lr=1e-2), steps=40, sections=sections, **layout)
            run_ranks(train_quietly, 4, plan)
            folders[model] = directory
        return folders[model]

    return get
