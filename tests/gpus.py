"""GPUs that are not there."""

from dataclasses import dataclass

import torch

GIB = 1 << 30


@dataclass
class Gpus:
    """Stand-in for GPUs with 80 GiB each."""

    free: list[float]

    def plant(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.free))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU-80G")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(self.free[index] * GIB), 80 * GIB))
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
