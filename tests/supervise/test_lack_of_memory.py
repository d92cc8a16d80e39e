"""What a lack of memory is recognised by, and what is said about it."""

from types import SimpleNamespace

import pytest
import torch
from tiny import ADAM, tiny_plan

from megagpt.plan import deepspeed_config_from_dict, make_plan
from megagpt.supervise import memory
from megagpt.supervise.memory import advice, exhausted_memory, shortage


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "gpu"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "gpu"),
        (RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), "gpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "host"),
        (MemoryError(), "host"),
        (OSError(12, "Cannot allocate memory"), "host"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), None),
    ],
)
def test_each_library_has_its_own_words(error: Exception, memory: str | None) -> None:
    assert exhausted_memory(error) == memory


def ranks(device: str):
    return SimpleNamespace(rank=0, world_size=2, pipeline_rank=0, device=SimpleNamespace(type=device))


def test_a_full_gpu_does_not_speak_against_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    said = shortage("gpu", tiny_plan(), ranks("cuda"), "CUDA error: out of memory\nand more")
    assert said == "out of memory in stage 0 of 1; its GPU has 80.0 GiB (out of memory)"


def test_a_full_host_of_gpus_is_told_as_such() -> None:
    plan = tiny_plan("llama", ADAM, sections={"checkpoint": {"directory": "checkpoints"}})
    offload = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    plan = make_plan(plan.run, deepspeed_config_from_dict({**plan.deepspeed.raw, "zero_optimization": offload}), 1)
    assert shortage("host", plan, ranks("cuda"), "bad_alloc").startswith("out of memory in stage 0 of 1; its host has ")
    *_, last = advice("host", plan, ranks("cuda")).splitlines()
    assert last.startswith("take more hosts, or fewer ranks on each; or switch off offload (zero_optimization, ")
    assert "save without a copy (checkpoint.asynchronous=false" in last


@pytest.mark.parametrize(("limit", "gib"), [(32 << 30, "16.0"), (None, "64.0"), (900 << 30, "64.0")])
def test_a_host_has_what_its_control_groups_leave_a_job(monkeypatch: pytest.MonkeyPatch, limit, gib) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "smallest_limit", lambda: limit)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 << 30))
    said = shortage("host", tiny_plan(), ranks("cpu"), "bad_alloc")
    assert said.startswith(f"out of memory in stage 0 of 1; its host has {gib} GiB for each of its ranks")
