"""Tiny runs of four ranks in a folder that all hosts share, and the words that submit them."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from bed import Cluster

BIN = Path(sys.executable).parent
OPTIONS = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
DECAY_STEPS = 90
"""The same for all runs, so that a shorter one is the beginning of a longer one."""


class Run:
    """TP2 x PP2, or what `parallel` says.

    Args:
        folder: for all of its files; is made.
        dataset: `data.*`.
        steps: of the run.
        sections: more keys of the run config, by section.
    """

    def __init__(self, folder: Path, dataset: dict[str, str], steps: int, **sections: dict):
        folder.mkdir()
        self.folder, self.steps = folder, steps
        tree: dict[str, dict] = {
            "model": dict(
                num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=300, max_position_embeddings=32
            ),
            "parallel": dict(
                tensor_model_parallel_size=2, pipeline_model_parallel_size=2, make_vocab_size_divisible_by=16
            ),
            "data": dataset,
            "optimizer": {"decay_steps": DECAY_STEPS},
            "training": {"steps": steps, "eval_batches": 1},
            "logging": {"interval": 1, "directory": str(folder / "logs")},
            "checkpoint": {"directory": str(folder / "checkpoints"), "save_interval": 4},
            "supervision": {"silent_seconds": 6.0, "hang_seconds": 20.0},
        }
        for name, section in sections.items():
            tree[name] = tree[name] | section
        self.checkpoints = Path(tree["checkpoint"]["directory"])
        self.config, self.deepspeed = folder / "run.yaml", folder / "ds.json"
        self.config.write_text(yaml.safe_dump(tree))
        self.deepspeed.write_text(
            json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0})
        )
        self.arguments = ("--config", str(self.config), "--deepspeed_config", str(self.deepspeed))

    def losses(self) -> dict[int, float]:
        """By step."""
        path = self.folder / "logs" / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may be half written
        records = map(json.loads, lines)
        return {record["step"]: record["loss"] for record in records if record["split"] == "train"}

    def step(self) -> int:
        """Steps done so far."""
        return max(self.losses(), default=0)

    def on_one_host(self, cluster: Cluster) -> dict[int, float]:
        """Train it here by torchrun; its losses."""
        command = [str(BIN / "torchrun"), "--nproc-per-node=4", "-m", "megagpt.train", *self.arguments]
        subprocess.run(command, env=cluster.environ, check=True, capture_output=True, timeout=200)
        losses = self.losses()
        assert list(losses) == list(range(1, self.steps + 1))
        return losses


def write_data(cluster: Cluster) -> dict[str, str]:
    """A tiny dataset that all hosts see: `data.*`; the same whenever asked on one cluster."""
    from tiny import write_tiny_dataset

    folder = cluster.folder.parent / "data"
    folder.mkdir(exist_ok=True)
    prefix, tokenizer = write_tiny_dataset(folder)
    return {"prefix": prefix, "tokenizer": tokenizer}


def output_option(cluster: Cluster) -> str:
    """Where jobs print to, as `Cluster.output` knows."""
    return f"--output={cluster.folder.parent}/job-%j.out"


def srun_job(cluster: Cluster, run: Run, *options: str) -> tuple[str, ...]:
    """sbatch's words for the shipped batch file, two ranks on each of two nodes.

    Args:
        cluster: to submit to.
        run: what to train.
        options: more of sbatch's.
    """
    configs = (str(run.config), str(run.deepspeed))
    return (output_option(cluster), *OPTIONS, "--ntasks-per-node=2", *options, "slurm/pretrain.sbatch", *configs)
