"""The doctor as a command, under the launcher that serves the meeting's port itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import LLAMA

from megagpt.parallel.launch import free_port

ROOT = Path(__file__).parents[2]
DEEPSPEED = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
DOCTOR = [str(ROOT / "tools/doctor.py"), "--config", "run.yaml", "--deepspeed_config", "ds.json"]


@pytest.fixture
def workplace(dataset, tmp_path) -> Path:
    """A folder with run.yaml and ds.json."""
    run = {
        "model": {**LLAMA, "vocab_size": 300, "max_position_embeddings": 32},
        "data": dataset,
        "training": {"steps": 4},
        "checkpoint": {"directory": "checkpoints"},
        "logging": {"directory": "logs"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    return tmp_path


def called(workplace: Path, *words: str, **environ: str) -> subprocess.CompletedProcess:
    """A Python command that has ended."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run(
        [sys.executable, *words], cwd=workplace, env=environ, capture_output=True, text=True, timeout=200, check=False
    )


def test_torchrun_starts_a_doctor_twice_that_finds_a_host_healthy(workplace) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    doctor = " ".join([sys.executable, *DOCTOR, "--json", "found.json"])
    done = called(workplace, *launcher, "--no-python", "sh", "-ec", f"{doctor}; {doctor}")
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((workplace / "found.json").read_text())
    assert {found["status"] for found in findings} == {"OK"}, findings
    assert [found["check"] for found in findings][-2:] == ["network", "collectives"]
    assert "gloo: sums over 2 ranks are right" in findings[-1]["text"]


def test_ranks_are_waited_for_as_long_as_was_asked(workplace) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = called(workplace, *DOCTOR, "--patience", "2", **place, MASTER_PORT=str(free_port()))
    assert done.returncode == 1
    assert " within 2 s: 1; see what their hosts print" in done.stdout


@pytest.mark.parametrize("patience", ["0", "nan", "inf"])
def test_a_patience_that_is_none_is_refused(workplace, patience: str) -> None:
    done = called(workplace, *DOCTOR, "--patience", patience)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --patience={float(patience)} must be 1 to 86400 seconds")
