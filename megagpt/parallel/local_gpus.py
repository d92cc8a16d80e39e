"""Ranks on the GPUs of this host, several on one GPU if there are fewer GPUs than ranks. No torch here."""

import os
import subprocess
import sys

from megagpt.errors import LaunchError

_COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def visible_gpus() -> list[str]:
    """How CUDA_VISIBLE_DEVICES names each GPU that this process may use; another process looks for them, as forks of
    one that has looked could not use them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    count = int(found.stdout.split()[-1]) if found.returncode == 0 else 0  # imports may print something before
    names = asked.split(",") if asked else [str(index) for index in range(count)]
    return names[:count]


def gpu_environments(gpus: list[str], world_size: int) -> list[dict[str, str]]:
    """What each rank finds in its environment: its GPU, the only one that it sees.

    NCCL refuses ranks of one host that share a GPU. Told that each is a host of its own, they meet over loopback. With
    one channel each, what waits for another rank leaves the GPU to it, and groups take little memory.

    Args:
        gpus: as `visible_gpus` gives them.
        world_size: how many ranks.

    Raises:
        LaunchError: there is no GPU.
    """
    if not gpus:
        raise LaunchError("no GPU is visible; leave out --gpus to use CPU processes, or see that nvidia-smi lists one")
    # Where this process computes on CPUs, it may have told DeepSpeed so.
    accelerator = {"DS_ACCELERATOR": "cuda"}
    environments = [{"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)], **accelerator} for rank in range(world_size)]
    if world_size > len(gpus):
        shared = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MAX_NCHANNELS": "1"}
        for rank, environment in enumerate(environments):
            environment |= {"NCCL_HOSTID": f"rank-{rank}", **shared}
    return environments
