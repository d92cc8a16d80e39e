"""Every command of README.md is run: here, or by continuous integration where it takes minutes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_dataset

ROOT = Path(__file__).parent.parent
SMALL = (
    "model.num_layers=2 model.hidden_size=32 model.num_attention_heads=4 model.num_query_groups=2"
    " model.ffn_hidden_size=64 model.max_position_embeddings=32 model.vocab_size=300 training.steps=4"
    " training.eval_interval=2 training.eval_batches=1 checkpoint.save_interval=2 optimizer.warmup_steps=1"
)
# What is appended to a command so that it ends soon.
SHORTER = {
    "deepspeed --num_gpus": SMALL,
    "deepspeed --hostfile": f"{SMALL} training.steps=1 data.split=[1,0,0] optimizer.warmup_steps=0",
    "torchrun": SMALL,
    "python tools/doctor.py": SMALL,
    "python tools/train_tokenizer.py": "--vocab-size 300",
    "tensorboard": "--inspect",
}
# Commands that are run elsewhere, and where.
ELSEWHERE = {
    "make quickstart": ".ci/run",
    "make test": ".ci/run",
    "python tools/collect_docs.py": "tools/quickstart.py",
}

# Slurm's sbatch reads the batch file (tests/slurm runs them), nobody tells of partitions; ssh asks this host for its
# address.
STAND_INS = {
    "sbatch": '#!/bin/bash\nfor word; do case $word in slurm/*) echo 7; exec bash -n "$word";; esac; done\nexit 1\n',
    "sinfo": "#!/bin/bash\nexit 1\n",
    "ssh": "#!/bin/bash\necho 127.0.0.1\n",
}


def commands() -> list[str]:
    """The lines of all bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shortened(command: str) -> str:
    extra = next((extra for start, extra in SHORTER.items() if command.startswith(start)), "")
    if command.startswith("deepspeed "):  # its default port may be taken by another job of this machine
        command = command.replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1)
    return f"{command} {extra}"


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder like the repository's, with a small corpus and stand-ins for a cluster's programs."""
    for name in ("tools", "ds_configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    write_tiny_dataset(tmp_path / "data")
    for made in (tmp_path / "data").iterdir():
        if made.name != "corpus.jsonl":
            made.unlink()
    (tmp_path / "my_run.yaml").write_text(
        "model: {preset: quickstart}\n"
        "parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}\n"
        "data: {prefix: data/dataset, tokenizer: data/tokenizer.model}\n"
        "training: {steps: 4}\n"
        "checkpoint: {directory: runs/hostfile}\n"
    )
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, script in STAND_INS.items():
        (stand_ins / name).write_text(script)
        (stand_ins / name).chmod(0o755)
    return tmp_path


def test_commands_of_the_readme(workplace):
    environment = dict(
        os.environ,
        PATH=f"{workplace / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    done = []
    for command in commands():
        if any(command.startswith(start) for start in ELSEWHERE):
            continue
        if command.startswith("printf"):  # the two nodes of the example are this machine
            command = command.replace(r"node1 slots=8\nnode2 slots=8", "localhost slots=4")
        result = subprocess.run(
            shortened(command), shell=True, cwd=workplace, env=environment, capture_output=True, text=True, timeout=150
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr, f"{command}\n{result.stderr}"
        done.append((command, result.stdout))
    printed = "\n".join(output for _, output in done)
    assert "step 4/4" in printed
    assert "the run is finished, nothing to do" in printed, "torchrun finds the run of the deepspeed launcher finished"
    assert "logits against the checkpoint's model" in printed
    assert len(done) > 12


@pytest.mark.parametrize(("command", "place"), ELSEWHERE.items())
def test_commands_that_are_run_elsewhere(command, place):
    words = command.replace("python tools/", "").split()[-1] if command.startswith("python") else command
    assert words in (ROOT / place).read_text()


def test_all_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:tools|ds_configs|slurm|megagpt)/[\w./]+\w", text):
        assert (ROOT / name).exists(), name
    for preset in re.findall(r"`((?:gpt|llama|tinyllama|megatron|quickstart)[\w.-]*)`", text):
        if "." not in preset or not preset.endswith((".yaml", ".py")):
            assert (ROOT / "megagpt" / "presets" / f"{preset}.yaml").exists() or preset == "megatron-core", preset
