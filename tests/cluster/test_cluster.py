"""The shipped batch files and every launcher on two nodes: the losses of one host to the last digit; and faults."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
STEPS = 12
OPTIONS = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")


class Run:
    """A tiny TP2 x PP2 run in a folder that all hosts share."""

    def __init__(self, folder: Path, dataset: dict[str, str], steps: int = STEPS):
        folder.mkdir()
        self.folder, self.steps = folder, steps
        tree = {
            "model": dict(
                num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=300, max_position_embeddings=32
            ),
            "parallel": dict(
                tensor_model_parallel_size=2, pipeline_model_parallel_size=2, make_vocab_size_divisible_by=16
            ),
            "data": dataset,
            "training": {"steps": steps, "eval_batches": 1},
            "logging": {"interval": 1, "directory": str(folder / "logs")},
            "checkpoint": {"directory": str(folder / "checkpoints"), "save_interval": 4},
            "supervision": {"silent_seconds": 6.0},
        }
        self.config, self.deepspeed = folder / "run.yaml", folder / "ds.json"
        self.config.write_text(yaml.safe_dump(tree))
        self.deepspeed.write_text(
            json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0})
        )
        self.arguments = ("--config", str(self.config), "--deepspeed_config", str(self.deepspeed))

    def losses(self) -> dict[int, float]:
        """By step."""
        records = map(json.loads, (self.folder / "logs" / "metrics.jsonl").read_text().splitlines())
        return {record["step"]: record["loss"] for record in records if record["split"] == "train"}

    def step(self) -> int:
        """Steps done so far."""
        path = self.folder / "logs" / "metrics.jsonl"
        return max(self.losses(), default=0) if path.exists() else 0


@pytest.fixture(scope="module")
def tiny_data(cluster) -> dict[str, str]:
    from tiny import write_tiny_dataset

    folder = cluster.folder.parent / "data"
    folder.mkdir()
    prefix, tokenizer = write_tiny_dataset(folder)
    return {"prefix": prefix, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def expected(cluster, tiny_data) -> dict[int, float]:
    """The losses of one host."""
    run = Run(cluster.folder.parent / "one-host", tiny_data)
    command = [str(BIN / "torchrun"), "--nproc-per-node=4", "-m", "megagpt.train", *run.arguments]
    subprocess.run(command, env=cluster.environ, check=True, capture_output=True, timeout=200)
    losses = run.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def job_of(cluster, run: Run, launcher: str) -> tuple[str, ...]:
    """sbatch's words for one way to start the ranks."""
    output = f"--output={cluster.folder.parent}/job-%j.out"
    configs = (str(run.config), str(run.deepspeed))
    if launcher == "srun":
        return (output, *OPTIONS, "--ntasks-per-node=2", "slurm/pretrain.sbatch", *configs)
    if launcher == "deepspeed without ssh":
        return (output, *OPTIONS, "--export=ALL,TASKS_PER_NODE=2", "slurm/pretrain_deepspeed.sbatch", *configs)
    hostfile = run.folder / "hostfile"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    train = f"megagpt.train {' '.join(run.arguments)}"
    deepspeed = f"deepspeed --hostfile {hostfile} --master_addr 10.77.0.11 --master_port 23111"
    passed = "-x PATH -x PYTHONPATH -x OMP_NUM_THREADS -x DS_ACCELERATOR"
    command = {
        "srun and torchrun": "srun torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d "
        f"--rdzv-endpoint=node1:23112 --rdzv-id=1 -m {train}",
        "deepspeed pdsh": f"{deepspeed} --launcher pdsh --no_local_rank --module {train}",
        "deepspeed openmpi": f"{deepspeed} --launcher openmpi --no_ssh_check "
        f'--launcher_args="--bind-to none --oversubscribe {passed}" --module {train}',
        "mpirun": f"mpirun -n 4 --hostfile {hostfile} --oversubscribe --bind-to none "
        f"--mca btl_tcp_if_include eth0 {passed} {sys.executable} -m {train}",
    }[launcher]
    passed_on = run.folder / "deepspeed_env"  # ssh passes no variables
    passed_on.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    variables = f"--export=ALL,DS_ENV_FILE={passed_on}"
    return (output, *OPTIONS, "--ntasks-per-node=1", "--cpus-per-task=2", variables, f"--wrap={command}")


LAUNCHERS = (
    "srun",
    "deepspeed without ssh",
    "srun and torchrun",
    "deepspeed pdsh",
    "deepspeed openmpi",
    "mpirun",
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_give_the_losses_of_one_host(cluster, tiny_data, expected, launcher) -> None:
    run = Run(cluster.folder.parent / launcher.replace(" ", "-"), tiny_data)
    job = cluster.submit(*job_of(cluster, run, launcher))
    state = cluster.wait_for(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 180)
    assert state == "COMPLETED", cluster.output(job)
    assert run.losses() == expected
    assert "Traceback" not in cluster.output(job)


def started(cluster, tiny_data, name: str, steps: int = STEPS) -> tuple[Run, str]:
    """A run under srun that has done its first steps."""
    run = Run(cluster.folder.parent / name, tiny_data, steps)
    job = cluster.submit(*job_of(cluster, run, "srun"))
    deadline = time.monotonic() + 120
    while run.step() < 5:
        assert time.monotonic() < deadline, cluster.output(job)
        assert cluster.state(job) in ("PENDING", "RUNNING"), cluster.output(job)
        time.sleep(0.2)
    return run, job


def signal_a_rank(cluster, host: str, number: str) -> None:
    """Send a signal to one rank on a host."""
    found = cluster.run(host, "pgrep", "-f", "-o", "megagpt[.]train").split()
    cluster.run(host, "kill", f"-{number}", found[-1])


def ranks_on(cluster, host: str) -> list[str]:
    return cluster.control("run", host, "pgrep", "-f", "megagpt[.]train").stdout.split()


@pytest.mark.parametrize(
    ("fault", "words"), [("KILL", "is gone: its process"), ("STOP", "stopped by a signal (SIGSTOP)")]
)
def test_a_rank_that_is_killed_or_stopped_ends_the_job_which_is_queued_again(cluster, tiny_data, fault, words) -> None:
    _, job = started(cluster, tiny_data, f"rank-{fault}", steps=4000)
    signal_a_rank(cluster, "node2", fault)
    deadline = time.monotonic() + 60
    while "queued again" not in cluster.output(job):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    text = cluster.output(job)
    assert re.search(rf"error: rank [23] on node2 .*{re.escape(words)}", text), text
    cluster.run("head", "scancel", job)
    cluster.wait_for(job, ("CANCELLED",), 60)


def test_a_cancelled_job_is_not_started_again_and_leaves_nothing(cluster, tiny_data) -> None:
    _, job = started(cluster, tiny_data, "cancelled", steps=4000)
    cluster.run("head", "scancel", job)
    assert cluster.wait_for(job, ("CANCELLED",), 60) == "CANCELLED"
    time.sleep(2)
    assert ranks_on(cluster, "node1") + ranks_on(cluster, "node2") == []
    assert cluster.state(job) == "CANCELLED"
    assert cluster.run("node1", "ls", "/dev/shm").split() == []


def test_the_doctor_passes_a_healthy_cluster_and_finds_a_slow_link(cluster, tiny_data) -> None:
    run = Run(cluster.folder.parent / "doctor", tiny_data)
    found = cluster.folder.parent / "doctor.json"
    output = f"--output={cluster.folder.parent}/job-%j.out"
    command = f"srun {sys.executable} tools/doctor.py {' '.join(run.arguments)} --json {found}"
    words = (output, *OPTIONS, "--ntasks-per-node=2", f"--wrap={command}")
    job = cluster.submit(*words)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), 120) == "COMPLETED", cluster.output(job)
    healthy = json.loads(found.read_text())
    assert {finding["status"] for finding in healthy} == {"OK"}, cluster.output(job)
    cluster.run(
        "node2",
        "tc",
        "qdisc",
        "add",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        "20mbit",
        "burst",
        "32k",
        "latency",
        "400ms",
    )
    cluster.run(
        "node1",
        "tc",
        "qdisc",
        "add",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        "20mbit",
        "burst",
        "32k",
        "latency",
        "400ms",
    )
    try:
        job = cluster.submit(*words)
        assert cluster.wait_for(job, ("COMPLETED", "FAILED"), 120) == "COMPLETED", cluster.output(job)
    finally:
        for host in ("node1", "node2"):
            cluster.run(host, "tc", "qdisc", "del", "dev", "eth0", "root")
    (slow,) = [finding for finding in json.loads(found.read_text()) if finding["status"] != "OK"]
    assert (slow["check"], slow["status"]) == ("network", "warning")
    assert slow["text"].startswith("node1 to node2: ")
