"""Rows of the table of verified layouts whose ranks are new processes, as they are on GPUs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.parallel.local_gpus import visible_gpus
from megagpt.verify.rows import ROWS

pytestmark = pytest.mark.usefixtures("libraries")

TOOLS = Path(__file__).parents[2] / "tools"


def test_rows_of_new_processes(tmp_path, monkeypatch):
    from megagpt.verify import table

    monkeypatch.setattr(table, "environments_of_ranks", lambda world_size: [{}] * world_size)
    (row,) = (row for row in ROWS if row.key == "llama | sgd | fp32 | TP2 SP | plain, ZeRO 1 | ")
    assert table.write_table([row], tmp_path / "table.md", on_gpus=True)
    text = (tmp_path / "table.md").read_text()
    assert "Written by `python tools/verify_table.py --gpus`" in text
    assert "on real NCCL processes" in text


def test_bytes_on_gpus_are_held_against_what_gpus_send():
    """Without CUDA an all-reduce stands in for what ranks of unequal parts scatter."""
    from megagpt.plan import traffic_per_step
    from megagpt.verify.measure import RankMeasurement
    from megagpt.verify.verdicts import _traffic

    (row, *_) = (row for row in ROWS if row.model == "mixtral" and row.layout.get("sp"))
    plan = row.plan()
    transfers = traffic_per_step(plan, 0)
    assert any(transfer.is_uneven for transfer in transfers)
    sent: dict[tuple[str, str], float] = {}
    for transfer in transfers:
        key = transfer.group, transfer.collective
        sent[key] = sent.get(key, 0.0) + transfer.ring_bytes
    on_gpu = RankMeasurement(0, 0, [], [], [], {}, {}, sent, device="cuda")
    on_cpu = dataclasses.replace(on_gpu, device="cpu")
    ranks = plan.world_size
    assert all(verdict.passed for verdict in _traffic(plan, [on_gpu] * ranks))
    assert not all(verdict.passed for verdict in _traffic(plan, [on_cpu] * ranks))


def test_a_host_without_gpus_says_so():
    command = [sys.executable, str(TOOLS / "verify_table.py"), "--gpus", "--only", "llama | sgd | fp32 | 1 rank"]
    done = subprocess.run([*command, "--output", os.devnull], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU is visible; leave out --gpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_on_the_gpus_of_this_host(tmp_path, monkeypatch):
    gpus = os.environ["GPUS_OF_THIS_HOST"]
    if gpus == "all":
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    if not visible_gpus():
        pytest.skip("this host shows no GPU")
    for words in ("llama | sgd | bf16 | 1 rank", "llama | sgd | fp32 | TP2 SP | plain, ZeRO 1"):
        command = [sys.executable, str(TOOLS / "verify_table.py"), "--gpus", "--only", words]
        subprocess.run([*command, "--output", str(tmp_path / "table.md")], check=True)
