"""Every shipped batch file, submitted by tools/submit.py as a user would: text, model, loss and export on two nodes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]

STEPS = 60
RANKS = ("--nodes=2", "--gpus-per-node=0", "--ranks-per-node=2", "--cpus-per-rank=1")


class Desk:
    """Where a user sits: a folder that all hosts share, and a terminal on the head."""

    def __init__(self, cluster, folder: Path):
        from tiny import write_tiny_dataset

        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        write_tiny_dataset(folder)
        for path in folder.glob("data.*"):
            path.unlink()
        self.config, self.deepspeed = folder / "run.yaml", folder / "ds.json"
        tree = {
            "model": dict(
                num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=300, max_position_embeddings=32
            ),
            "parallel": dict(
                tensor_model_parallel_size=2, pipeline_model_parallel_size=2, make_vocab_size_divisible_by=16
            ),
            "data": {"prefix": str(folder / "data"), "tokenizer": str(folder / "tokenizer.model")},
            "training": {"steps": STEPS, "eval_batches": 1},
        }
        self.config.write_text(yaml.safe_dump(tree))
        self.deepspeed.write_text(json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}))

    def submit(self, *words: str) -> list[str]:
        """Call tools/submit.py on the head; the jobs' numbers."""
        output = f"--sbatch=--output={self.cluster.folder.parent}/job-%A.out"
        command = (sys.executable, "tools/submit.py", words[0], output, *words[1:])
        said = self.cluster.run("head", *command)
        return re.findall(r"\d+", said.partition(":")[0])

    def run_keys(self, name: str) -> tuple[str, ...]:
        """Overrides for a run with files of its own."""
        return (
            f"checkpoint.directory={self.folder}/{name}/checkpoints",
            f"logging.directory={self.folder}/{name}",
            "logging.interval=1",
            "checkpoint.save_interval=20",
        )

    def losses(self, name: str) -> dict[int, float]:
        """Of a run, by step; of a step that was done twice the last one."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
        return {record["step"]: record["loss"] for record in records if record["split"] == "train"}

    def finished(self, *jobs: str, seconds: float = 150) -> str:
        """Wait until jobs are completed; what the last one has printed."""
        for job in jobs:
            state = self.cluster.wait_for(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds)
            assert state == "COMPLETED", self.cluster.output(job)
        return self.cluster.output(jobs[-1])


def test_from_text_to_an_exported_model_by_jobs_alone(cluster) -> None:
    desk = Desk(cluster, cluster.folder.parent / "desk")
    text = (str(desk.folder / "tokenizer.model"), str(desk.folder / "data"), str(desk.folder / "corpus.jsonl"))
    (data,) = desk.submit("preprocess", *text, "--tasks=2", "--cpus=1")
    configs = (str(desk.config), str(desk.deepspeed))
    (trained,) = desk.submit("pretrain", *configs, *RANKS, "--after", data, *desk.run_keys("srun"))
    printed = desk.finished(trained)
    assert "TP 2 x PP 2 x DP 1" in printed
    assert "started by srun" in printed
    one_host = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=4", "-m", "megagpt.train"]
    arguments = ("--config", configs[0], "--deepspeed_config", configs[1], *desk.run_keys("one-host"))
    subprocess.run([*one_host, *arguments], env=cluster.environ, check=True, capture_output=True, timeout=200)
    expected = desk.losses("one-host")
    assert list(expected) == list(range(1, STEPS + 1))
    assert desk.losses("srun") == expected

    # A chain by the deepspeed launcher: the first job is stopped in mid-course, the next one goes on.
    first, second = desk.submit(
        "pretrain", *configs, *RANKS, "--launcher=deepspeed", "--chain=2", *desk.run_keys("chain")
    )
    deadline = time.monotonic() + 120
    while max(desk.losses("chain"), default=0) < 3:
        assert time.monotonic() < deadline, cluster.output(first)
        time.sleep(0.1)
    cluster.run("head", "scancel", "--signal=USR1", first)
    assert "stopped by a signal" in desk.finished(first), cluster.output(first)
    assert "queued again" not in cluster.output(first)
    assert "resumed from" in desk.finished(second)
    assert desk.losses("chain") == expected

    saved = f"{desk.folder}/srun/checkpoints"
    found, export = desk.folder / "found.json", desk.folder / "hf"
    (scored,) = desk.submit("evaluate", saved, str(found), *RANKS, "--", "--split", "test")
    (converted,) = desk.submit("convert", saved, str(export), "--cpus=1")
    desk.finished(scored, converted)
    assert json.loads(found.read_text())["layout"]["world_size"] == 4
    assert (export / "certificate.json").is_file()


def test_a_plan_that_objects_makes_no_job(cluster) -> None:
    desk = Desk(cluster, cluster.folder.parent / "objections")
    words = ("pretrain", str(desk.config), str(desk.deepspeed), *RANKS, "parallel.tensor_model_parallel_size=3")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert result.returncode == 2
    assert "advice: nearest layout of 4 ranks" in result.stderr
    words = ("pretrain", str(desk.config), str(desk.deepspeed), "--gpus-per-node=4")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert "the nodes of partition main have 2 GPUs; use 2" in result.stderr
    words = ("pretrain", str(desk.config), str(desk.deepspeed), *RANKS, "--account=nobody", "--time=61")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert "--time=61 is more than partition main allows (01:00:00)" in result.stderr
    assert cluster.run("head", "squeue", "--noheader", "--name=megagpt") == ""
