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

BIN = Path(sys.executable).parent
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
        self.deepspeed.write_text(
            json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}})
        )
        self.configs = (str(self.config), str(self.deepspeed))

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

    def arguments(self, name: str) -> tuple[str, ...]:
        """Of the training command, for a run with files of its own."""
        return ("--config", self.configs[0], "--deepspeed_config", self.configs[1], *self.run_keys(name))

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


@pytest.fixture(scope="module")
def desk(cluster) -> Desk:
    """With a dataset, made by a job array."""
    desk = Desk(cluster, cluster.folder.parent / "desk")
    text = (str(desk.folder / "tokenizer.model"), str(desk.folder / "data"), str(desk.folder / "corpus.jsonl"))
    (array,) = desk.submit("preprocess", *text, "--tasks=2", "--cpus=1")
    desk.finished(array)
    return desk


@pytest.fixture(scope="module")
def expected(desk: Desk) -> dict[int, float]:
    """The losses of one host."""
    command = [str(BIN / "torchrun"), "--nproc-per-node=4", "-m", "megagpt.train", *desk.arguments("one-host")]
    subprocess.run(command, env=desk.cluster.environ, check=True, capture_output=True, timeout=200)
    losses = desk.losses("one-host")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_training_and_then_its_loss_and_export(desk: Desk, expected) -> None:
    saved, found, export = desk.folder / "srun" / "checkpoints", desk.folder / "found.json", desk.folder / "hf"
    (trained,) = desk.submit("pretrain", *desk.configs, *RANKS, *desk.run_keys("srun"))
    printed = desk.finished(trained)
    assert "TP 2 x PP 2 x DP 1" in printed
    assert "started by srun" in printed
    assert desk.losses("srun") == expected
    (scored,) = desk.submit("evaluate", str(saved), str(found), *RANKS, "--after", trained, "--", "--split", "test")
    (converted,) = desk.submit("convert", str(saved), str(export), "--cpus=1", "--after", scored)
    desk.finished(scored, converted)
    assert json.loads(found.read_text())["layout"]["world_size"] == 4
    assert (export / "certificate.json").is_file()


def test_a_chain_by_the_deepspeed_launcher_goes_on_where_its_first_job_was_stopped(desk: Desk, expected) -> None:
    first, second = desk.submit(
        "pretrain", *desk.configs, *RANKS, "--launcher=deepspeed", "--chain=2", *desk.run_keys("chain")
    )
    deadline = time.monotonic() + 120
    while max(desk.losses("chain"), default=0) < 3:
        assert time.monotonic() < deadline, desk.cluster.output(first)
        time.sleep(0.1)
    desk.cluster.run("head", "scancel", "--signal=USR1", first)
    assert "stopped by a signal" in desk.finished(first), desk.cluster.output(first)
    assert "queued again" not in desk.cluster.output(first)
    assert "resumed from" in desk.finished(second)
    assert desk.losses("chain") == expected


def test_what_deepspeeds_slurm_launcher_gets_wrong_is_mended(desk: Desk, expected) -> None:
    hostfile, variables = desk.folder / "hostfile", desk.folder / "ds_env"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    variables.write_text("PROBE_WORDS=a b\nPROBE_LIST=x,y\n")
    command = (
        f"deepspeed --launcher slurm --hostfile {hostfile} --no_ssh_check --master_addr node1 "
        f'--launcher_args="--ntasks-per-node=2" megagpt/train.py {" ".join(desk.arguments("slurm"))}'
    )
    job = desk.cluster.submit(
        *(f"--output={desk.cluster.folder.parent}/job-%j.out", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"),
        *(f"--export=ALL,DS_ENV_FILE={variables}", f"--wrap={command}"),
    )
    printed = desk.finished(job)
    assert f'DeepSpeed\'s launcher has damaged PROBE_WORDS of {variables} ("a b" instead of a b)' in printed
    assert f"has damaged PROBE_LIST of {variables} (x instead of x,y)" in printed
    assert printed.count("has damaged") == 2
    assert desk.losses("slurm") == expected


def test_a_plan_that_objects_makes_no_job(cluster) -> None:
    desk = Desk(cluster, cluster.folder.parent / "objections")
    words = ("pretrain", *desk.configs, *RANKS, "parallel.tensor_model_parallel_size=3")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert result.returncode == 2
    assert "advice: nearest layout of 4 ranks" in result.stderr
    words = ("pretrain", *desk.configs, "--gpus-per-node=4")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert "the nodes of partition main have 2 GPUs; use 2" in result.stderr
    words = ("pretrain", *desk.configs, *RANKS, "--account=nobody", "--time=61")
    result = cluster.control("run", "head", sys.executable, "tools/submit.py", *words)
    assert "--time=61 is more than partition main allows (01:00:00)" in result.stderr
    assert cluster.run("head", "squeue", "--noheader", "--name=megagpt") == ""
