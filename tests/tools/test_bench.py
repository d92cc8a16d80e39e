"""The benchmark runs all its sides on the same model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", ["smoke", "smoke-moe"])
def test_every_side_is_measured(size):
    command = f"tools/bench/train_step.py --sizes {size} --precisions bf16 --threads 1 --rounds 1 --steps 1"
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode in (0, 1), result.stderr  # 1: a goal is missed, which says nothing at this size
    speeds = dict(re.findall(r"│ ([\w-]+) +│ +([\d,]+) │", result.stdout))
    assert set(speeds) == {"megagpt", "torch", "trainer", "torch-pure"}
    assert all(int(speed.replace(",", "")) > 0 for speed in speeds.values())
    assert re.search(rf"missed: {size}, bf16|all goals met", result.stdout)


def test_start_up_is_measured():
    command = [sys.executable, "tools/bench/start_up.py", "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, 1), result.stderr
    found = re.findall(r"^│ ([\w., /-]+?) +│ +([\d.]+) │ +[\d.]+ x │ +([\d.]+) │$", result.stdout, re.M)
    seconds = {name: float(cpu) for name, cpu, _ in found}
    assert len(seconds) == 5
    assert seconds["megagpt.train, one step"] > seconds["import torch"], "a step needs torch"
    assert max(seconds["tools/plan.py"], seconds["megagpt.train --help"]) < seconds["import torch"], "these do not"


def test_saves_and_restores_are_measured(tmp_path):
    command = f"tools/bench/checkpoint.py --size smoke --rounds 1 --directory {tmp_path}"
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode in (0, 1), result.stderr
    assert result.stderr == ""
    found = re.findall(
        r"^(save|restore from [\w ]+): .* ([\d.]+) s.*: ([\d.]+) x \(goal: ([\d.]+)\)$", result.stdout, re.M
    )
    assert [name for name, *_ in found] == ["save", "restore from disk", "restore from page cache"]
    assert all(float(ratio) > 0 for _, _, ratio, _ in found)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_read_from_one_dataset_and_from_many():
    command = "tools/bench/samples.py --documents 20000 --sides megagpt"
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode in (0, 1), result.stderr
    cases = re.findall(r"│ (\d+ \w+) +│ megagpt │ +([\d.]+) │ +│ +0 │ +\d+ │ +([\d.]+) │", result.stdout)
    assert [case for case, *_ in cases] == ["1 epoch", "10 epochs", "20 datasets"]


def test_preprocessing_is_measured_and_judged(tmp_path):
    command = (
        f"tools/bench/preprocess.py --kinds huggingface --megabytes 1 --vocab-size 600 --rounds 1 --work-dir {tmp_path}"
    )
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1, result.stderr  # speed goals are missed at this size
    assert re.search(
        r"^MISSED   huggingface, megagpt, auto: [\d.]+ MB per CPU-second \(goal: at least 40\)$", result.stdout, re.M
    )
    assert len(re.findall(r"^reached  .*: the files are the same$", result.stdout, re.M)) == 4
    assert len(re.findall(r"^reached  .* MB above the imports", result.stdout, re.M)) == 6
    assert "not measured: the ratios to Megatron-LM" in result.stdout
