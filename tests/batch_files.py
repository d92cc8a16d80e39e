"""The shipped batch files run with stand-ins for srun and scontrol, which write down how they were called."""

import subprocess
import sys
from pathlib import Path

from repository_copy import ROOT

BATCH_FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
PRETRAIN, DEEPSPEED, PREPROCESS, CONVERT, EVALUATE = (
    ROOT / "slurm" / f"{n}.sbatch" for n in ("pretrain", "pretrain_deepspeed", "preprocess", "convert", "evaluate")
)
RUN = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 16,
    },
    "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "training": {"steps": 3},
}
# Stand-ins write down how they were called; srun goes on to the command after its own options if SRUN_RUNS is set.
STUBS = {
    "python": f'PYTHONPATH={ROOT} exec {sys.executable} "$@"',  # the code beside these tests, wherever it is installed
    "scontrol": """
        echo "scontrol $*" >>calls
        # Slurm has a job that it queues again end: here the batch file, whose python has called this.
        if [[ $1 == requeue ]]; then kill "$(cut -d ' ' -f 4 "/proc/$PPID/stat")"; exit; fi
        seq -f "node%g" "${NUM_HOSTS:-2}" """,
    "squeue": "if [[ $* == *--jobs* ]]; then echo RUNNING; fi",
    "srun": """
        if [[ $1 == --help ]]; then echo "${SRUN_HELP:-}"; exit; fi
        echo srun >>calls
        printf '%s\\0' "$@" >srun_arguments
        env -0 >srun_environment
        while [[ ${1:-} == --* ]]; do shift; done
        if [[ -n ${SRUN_RUNS:-} ]]; then exec "$@"; fi
        exit "${SRUN_EXITS:-0}" """,
    "deepspeed": """
        printf '%s\\0' "$@" >deepspeed_arguments
        while [[ $1 != --hostfile ]]; do shift; done
        if [[ -f $2 ]]; then cat "$2" >hostfile_seen; fi
        grep SigIgn /proc/$$/status >ignored_signals""",
}
ALLOCATION = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "6",
}


ARGUMENTS = {
    PRETRAIN: ("run.yaml", "ds.json"),
    DEEPSPEED: ("run.yaml", "ds.json"),
    PREPROCESS: ("tok.model", "out", "a.jsonl"),
    CONVERT: ("checkpoints", "hf"),
    EVALUATE: ("checkpoints", "found.json"),
}


def submit(folder: Path, batch_file: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a batch file as Slurm would; a variable that is empty is not set."""
    environ = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **ALLOCATION, **variables}
    environ = {key: value for key, value in environ.items() if value}
    command = ["bash", str(batch_file), *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def words(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def srun_environment(folder: Path) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in words(folder / "srun_environment"))
