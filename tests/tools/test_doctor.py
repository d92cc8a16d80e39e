"""The doctor as a command, under the launcher that serves the meeting's port itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from tiny import LLAMA

from megagpt.parallel.launch import free_port

ROOT = Path(__file__).parents[2]
DEEPSPEED = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}


def test_torchrun_starts_a_doctor_twice_that_finds_a_host_healthy(dataset, tmp_path) -> None:
    run = {
        "model": {**LLAMA, "vocab_size": 300, "max_position_embeddings": 32},
        "data": dataset,
        "training": {"steps": 4},
        "checkpoint": {"directory": "checkpoints"},
        "logging": {"directory": "logs"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    doctor = f"{sys.executable} {ROOT}/tools/doctor.py --config run.yaml --deepspeed_config ds.json --json found.json"
    words = [sys.executable, *launcher, "--no-python", "sh", "-ec", f"{doctor}; {doctor}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "found.json").read_text())
    assert {found["status"] for found in findings} == {"OK"}, findings
    assert [found["check"] for found in findings][-2:] == ["network", "collectives"]
    assert "gloo: sums over 2 ranks are right" in findings[-1]["text"]
