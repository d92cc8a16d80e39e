"""tools/submit.py with a stand-in for sbatch: what it is told, what is printed, and what is refused before."""

import contextlib
import importlib.util
import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from repository_copy import ROOT, lay_out

from megagpt.errors import run_command

RUN = {
    "model": dict(num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=300, max_position_embeddings=16),
    "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "data": {"prefix": "dataset"},
    "training": {"steps": 3},
    "checkpoint": {"directory": "checkpoints"},
}
DEEPSPEED = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1}
STUBS = {
    "sinfo": '[ -n "$SINFO" ] && echo "$SINFO" || exit 1',
    "sbatch": """
        if [[ -n ${REFUSES:-} && $(grep -c . calls 2>/dev/null || true) -ge ${REFUSES_FROM:-0} ]]; then
          echo "sbatch: error: $REFUSES" >&2; exit 1
        fi
        printf '%q ' "$@" >>calls; echo >>calls
        env | grep -E '^(CONTAINER|REQUEUE|MEGAGPT_CHAIN|TASKS_PER_NODE)' | sort | tr '\\n' ' ' >>variables
        echo >>variables
        echo $((99 + $(grep -c . calls)))""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The repository's folder as the command sees it."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    return lay_out(tmp_path, RUN, DEEPSPEED, STUBS)


@dataclass(frozen=True)
class Said:
    """What a command leaves."""

    returncode: int
    stdout: str
    stderr: str


def submit(folder: Path, *words: str, **variables: str) -> Said:
    """Call the command in the folder, in this process: it takes a hundredth of a second."""
    path = ROOT / "tools" / "submit.py"
    spec = importlib.util.spec_from_file_location("submit_command", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    environ = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **variables}
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, environ, clear=True),
        mock.patch.object(sys, "argv", ["submit.py", *words]),
        pytest.raises(SystemExit) as ended,
    ):
        run_command(module.main)
    return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def calls(folder: Path) -> list[list[str]]:
    path = folder / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def variables(folder: Path) -> list[dict[str, str]]:
    return [
        dict(word.split("=", 1) for word in line.split()) for line in (folder / "variables").read_text().splitlines()
    ]


PRETRAIN = ("pretrain", "run.yaml", "ds.json")


def test_a_job_gets_its_nodes_gpus_and_time(folder: Path) -> None:
    result = submit(
        folder, *PRETRAIN, "--nodes=2", "--account", "team", "--qos=high", "training.steps=5", "--sbatch=--exclude=n7"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "job 100: pre-training on 2 nodes x 8 GPUs, 24:00:00\n"
    assert "layout     16 ranks = tensor 2 x pipeline 2 x data 4" in result.stderr
    (words,) = calls(folder)
    assert words == [
        *("--parsable", "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=8"),
        *("--time=24:00:00", "--account=team", "--qos=high", "--exclude=n7"),
        *("slurm/pretrain.sbatch", "run.yaml", "ds.json", "training.steps=5"),
    ]


def test_what_slurm_says_of_the_partition_counts(folder: Path) -> None:
    told = "short*|30:00|4|16|gpu:2"
    result = submit(folder, *PRETRAIN, SINFO=told)  # one copy of the model
    assert result.returncode == 0, result.stderr
    assert {"--nodes=2", "--gpus-per-node=2", "--cpus-per-task=8", "--time=00:30:00"} <= set(calls(folder)[0])
    for words, refusal in (
        (("--gpus-per-node=8",), "the nodes of partition short have 2 GPUs; use 2"),
        (("--time=1:00:00",), "--time=1:00:00 is more than partition short allows (00:30:00)"),
        (("--partition=long",), "--partition=long is none of this cluster's; use short"),
    ):
        result = submit(folder, *PRETRAIN, *words, SINFO=told)
        assert (result.returncode, result.stdout) == (2, "")
        assert refusal in result.stderr
    assert len(calls(folder)) == 1


def test_deepspeed_launchers_have_the_cpus_of_their_ranks(folder: Path) -> None:
    result = submit(folder, *PRETRAIN, "--launcher=deepspeed", "--gpus-per-node=0", "--ranks-per-node=4", "--nodes=2")
    assert result.returncode == 0, result.stderr
    assert {"--ntasks-per-node=1", "--cpus-per-task=32", "slurm/pretrain_deepspeed.sbatch"} <= set(calls(folder)[0])
    assert variables(folder) == [{"TASKS_PER_NODE": "4"}]


def test_the_plan_objects_before_anything_is_submitted(folder: Path) -> None:
    result = submit(folder, *PRETRAIN, "--nodes=2", "parallel.tensor_model_parallel_size=3")
    assert (result.returncode, calls(folder)) == (2, [])
    assert result.stderr.startswith("error: ")
    assert "advice: nearest layout of 16 ranks" in result.stderr


def test_a_chain_goes_on_from_job_to_job(folder: Path) -> None:
    result = submit(folder, *PRETRAIN, "--nodes=1", "--chain=3", "--after=7,8")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "jobs 100, 101, 102: pre-training on 1 node x 8 GPUs, 24:00:00 each\n"
    waiting = [[word for word in words if "dep" in word] for words in calls(folder)]
    assert waiting == [
        [f"--dependency={condition}", "--kill-on-invalid-dep=yes"]
        for condition in ("afterok:7:8", "afterany:100", "afterany:101")
    ]
    assert variables(folder) == [{"REQUEUE": "no"}, *[{"MEGAGPT_CHAIN": "100", "REQUEUE": "no"}] * 2]


def test_a_chain_needs_checkpoints_and_a_length(folder: Path) -> None:
    for words, refusal in (
        (("--chain=2", "checkpoint.directory=null"), "--chain needs checkpoint.directory"),
        (("--chain=0",), "--chain=0 is less than 1"),
        (("--after=job7",), "--after=job7 is no number of a job"),
        (("--sbatch=exclude=n7",), "--sbatch=exclude=n7 is no option of sbatch"),
        (("--container-mounts=/a:/a",), "--container-mounts without --container"),
        (("--", "--verbose"), "training takes key=value changes only"),
    ):
        result = submit(folder, *PRETRAIN, "--nodes=1", *words)
        assert (result.returncode, calls(folder)) == (2, []), result.stderr
        assert refusal in result.stderr


def test_what_is_printed_does_what_submitting_does(folder: Path) -> None:
    words = (*PRETRAIN, "--nodes=1", "--chain=3", "logging.directory=my logs", "--container=nvcr.io#a/b:1")
    assert submit(folder, *words).returncode == 0
    submitted = calls(folder), variables(folder)
    (folder / "calls").unlink()
    (folder / "variables").unlink()
    printed = submit(folder, *words, "--print").stdout
    assert calls(folder) == []
    environ = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", printed], cwd=folder, env=environ, check=True)
    assert (calls(folder), variables(folder)) == submitted
    assert "--parsable" not in submit(folder, *PRETRAIN, "--nodes=1", "--print").stdout


def test_printing_needs_no_slurm(folder: Path) -> None:
    for stub in (folder / "bin").iterdir():
        stub.unlink()
    environ = {"PATH": str(folder / "bin")}
    assert submit(folder, *PRETRAIN, "--nodes=1", "--print", **environ).returncode == 0
    result = submit(folder, *PRETRAIN, "--nodes=1", **environ)
    assert result.returncode == 2
    assert "error: sbatch is not on PATH; run this on a login node of the cluster, or add --print" in result.stderr


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("invalid partition specified: gpu", "give one of `sinfo` as --partition"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "as --account"),
        ("Batch job submission failed: Requested node configuration is not available", "ask for less per node"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "does not answer"),
        ("something new", "see `man sbatch`"),
    ],
)
def test_what_sbatch_refuses_is_said_in_its_words_with_advice(folder: Path, said: str, advice: str) -> None:
    result = submit(folder, *PRETRAIN, "--nodes=1", REFUSES=said)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: sbatch has refused the job: {said}; ")
    assert advice in result.stderr


def test_a_chain_that_breaks_says_what_is_queued(folder: Path) -> None:
    result = submit(folder, *PRETRAIN, "--nodes=1", "--chain=4", REFUSES="Job submit limit exceeded", REFUSES_FROM="2")
    assert result.returncode == 2
    assert "use a shorter --chain. Queued already: 100, 101; `scancel 100 101` takes them back" in result.stderr


def test_containers_see_what_lies_outside(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "data").mkdir()
    words = (f"data.prefix={elsewhere}/data/set", f"checkpoint.directory={elsewhere}/runs/a", "--nodes=1")
    result = submit(folder, *PRETRAIN, *words, "--container=image", "--container-mounts=/opt:/opt:ro")
    assert result.returncode == 0, result.stderr
    assert variables(folder) == [{"CONTAINER": "image", "CONTAINER_MOUNTS": f"/opt:/opt:ro,{elsewhere}:{elsewhere}"}]
    for image, mounts, refusal in (
        ("no.sif", "/a:/a", "--container=no.sif: there is no such file"),
        ("image", "/a", "--container-mounts=/a is not of the form HOST:CONTAINER"),
    ):
        result = submit(folder, *PRETRAIN, "--nodes=1", f"--container={image}", f"--container-mounts={mounts}")
        assert result.returncode == 2
        assert refusal in result.stderr


def test_preprocessing_in_an_array(folder: Path) -> None:
    (folder / "tok.model").write_text("")
    result = submit(
        folder, "preprocess", "tok.model", "out", "a.jsonl", "*.jsonl", "--tasks=4", "--", "--min-length", "9"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "job 100: preprocessing of a.jsonl, *.jsonl in 4 tasks, 12:00:00\n"
    assert calls(folder)[0] == [
        *("--parsable", "--time=12:00:00", "--array=0-3", "--output=%x-%A-%a.out", "slurm/preprocess.sbatch"),
        *("tok.model", "out", "a.jsonl", "*.jsonl", "--min-length", "9"),
    ]
    for words, refusal in (
        (("tok.model", "out", "b.jsonl"), "b.jsonl: no such file, folder or glob"),
        (("tok", "out", "a.jsonl"), "tokenizer tok does not exist"),
        (("tok.model", "out", "a.jsonl", "--tasks=0"), "--tasks=0 is less than 1"),
    ):
        result = submit(folder, "preprocess", *words)
        assert (result.returncode, len(calls(folder))) == (2, 1)
        assert refusal in result.stderr


def test_conversion(folder: Path) -> None:
    result = submit(folder, "convert", "checkpoints", "hf", "--cpus=4", "--", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert "conversion of checkpoints/step-00000003 to hf" in result.stdout
    words = ["--parsable", "--cpus-per-task=4", "--time=04:00:00", "slurm/convert.sbatch", "checkpoints", "hf"]
    assert calls(folder)[0] == [*words, "--dtype", "bfloat16"]
    (folder / "hf").mkdir()
    assert "hf exists already" in submit(folder, "convert", "checkpoints", "hf").stderr
    assert submit(folder, "convert", "checkpoints", "hf", "--", "--overwrite").returncode == 0
    assert "nowhere: no checkpoint here" in submit(folder, "convert", "nowhere", "x").stderr


def test_evaluation_takes_the_ranks_of_one_copy_of_the_model(folder: Path) -> None:
    result = submit(folder, "evaluate", "checkpoints", "found.json", "training.seed=3", "--", "--split", "test")
    assert result.returncode == 0, result.stderr
    words = calls(folder)[0]
    assert {"--nodes=1", "--gpus-per-node=4", "slurm/evaluate.sbatch"} <= set(words)
    assert words[-5:] == ["checkpoints", "found.json", "training.seed=3", "--split", "test"]
    assert "tensor 2 x pipeline 2 x data 1" in result.stderr
    alone = submit(folder, "evaluate", "checkpoints", "found.json", "--world-size=1")
    assert "1 ranks = tensor 1" in alone.stderr or "1 rank = tensor 1" in alone.stderr, alone.stderr
    refused = submit(folder, "evaluate", "checkpoints", "x.json", "parallel.tensor_model_parallel_size=3")
    assert (refused.returncode, len(calls(folder))) == (2, 2)
    damaged = folder / "checkpoints" / "step-00000003" / "manifest.json"
    damaged.write_text("{}")
    assert "is no manifest of a checkpoint (KeyError: 'step')" in submit(folder, "evaluate", "checkpoints", "x").stderr


def test_elsewhere_and_wrong_words(folder: Path) -> None:
    (folder / "slurm").unlink()
    assert "slurm/pretrain.sbatch is not in" in submit(folder, *PRETRAIN, "--nodes=1").stderr
    assert "invalid choice: 'train'" in submit(folder, "train").stderr


def test_no_torch_is_needed(folder: Path) -> None:
    (folder / "torch.py").write_text("raise ImportError('torch is not to be imported')\n")
    environ = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    for words in ((*PRETRAIN, "--nodes=1"), ("evaluate", "checkpoints", "x.json")):
        command = [sys.executable, "tools/submit.py", *words, "--print"]
        subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True)
