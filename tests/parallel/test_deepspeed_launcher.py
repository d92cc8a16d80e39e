"""The defects of DeepSpeed's launcher, shown on the one that is installed, and what we make of them."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megagpt.errors import LaunchError
from megagpt.parallel import deepspeed_launcher
from megagpt.parallel.deepspeed_launcher import (
    inspect_launcher,
    launchers_of_other_jobs,
    mend_variables,
    parse_launcher,
    pdsh_without_questions,
    require_right_host,
    uneven_tasks,
)
from megagpt.parallel.launch import Launch, detect_launch

pytestmark = pytest.mark.usefixtures("libraries")

ROOT = Path(__file__).parents[2]
TWO_HOSTS = {"node1": [0, 1], "node2": [0, 1]}


def arguments(*words: str) -> argparse.Namespace:
    """DeepSpeed's own reading of its command line."""
    from deepspeed.launcher.runner import parse_args

    return parse_args([*words, "--module", "megagpt.train", "--config", "run.yaml"])


def command(launcher: str, *words: str, exports: tuple[tuple[str, str], ...] = ()) -> list[str]:
    """What `deepspeed --launcher ...` would run."""
    from deepspeed.launcher import multinode_runner, runner

    world = runner.encode_world_info(TWO_HOSTS)
    args = arguments("--launcher", launcher, "--master_addr", "10.0.0.1", *words)
    pool = {host: len(slots) for host, slots in TWO_HOSTS.items()}
    made = {
        "slurm": lambda: multinode_runner.SlurmRunner(args, world, pool),
        "openmpi": lambda: multinode_runner.OpenMPIRunner(args, world, pool),
        "mpich": lambda: multinode_runner.MPICHRunner(args, world, pool),
        "pdsh": lambda: multinode_runner.PDSHRunner(args, world),
    }[launcher]()
    for name, value in exports:
        made.add_export(name, value)
    built = made.get_cmd({}, TWO_HOSTS)
    return built[1] if launcher == "pdsh" else built  # of pdsh the command that ends the job


def launched(launcher: str, rank: int = 0) -> Launch:
    return Launch(rank, rank % 2, 4, "node1", 1234, launcher)


def local_launcher(*options: str, world: dict[str, list[int]] | None = None, port: int = 29500) -> list[str]:
    """The command line of the process that starts the ranks of a host."""
    from deepspeed.launcher.runner import encode_world_info

    encoded = encode_world_info(world or TWO_HOSTS)
    start = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
    return [*start, *options, "--master_addr=10.0.0.1", f"--master_port={port}", "--module", "megagpt.train"]


# ------------------------------------------------------------ 1, 2, 3: --launcher slurm


def test_slurm_sets_no_ranks_so_srun_is_asked() -> None:
    words = command("slurm")
    assert words[:3] == ["srun", "-n", "4"]
    assert not any(re.search("RANK|MASTER", word) for word in words)
    task = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
    launch = detect_launch({**task, "SLURM_STEP_NODELIST": "node[1-2]"})
    assert (launch.launcher, launch.rank, launch.local_rank, launch.world_size) == ("srun", 3, 1, 4)
    assert launch.master_addr == "node1"


def test_slurm_ignores_slots_so_uneven_hosts_are_told() -> None:
    assert not any("ntasks-per-node" in word for word in command("slurm"))
    (remark,) = uneven_tasks(launched("srun"), {"SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert remark.startswith("hosts have 3,1 ranks")
    assert '--launcher_args="--ntasks-per-node=N"' in remark
    for even in ("2(x2)", "4", "2(x3),2", ""):
        assert uneven_tasks(launched("srun"), {"SLURM_STEP_TASKS_PER_NODE": even}) == []
    assert uneven_tasks(launched("srun", rank=1), {"SLURM_STEP_TASKS_PER_NODE": "3,1"}) == []


@pytest.mark.parametrize("launcher", ["slurm", "mpich"])
def test_slurm_and_mpich_cannot_start_modules_so_the_file_can_be_given(launcher: str) -> None:
    words = command(launcher)
    if launcher == "slurm":
        assert words[words.index("megagpt.train") - 2 :][:2] == [sys.executable, "-u"]
    else:  # a file is no module either
        (helper,) = (index for index, word in enumerate(words) if word.endswith("/launcher_helper.py"))
        assert words[helper - 1] == "-m"
    started = [sys.executable, "megagpt/train.py", "--help"]
    told = subprocess.run(started, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert "run config" in told.stdout


def test_mpich_sets_ranks_by_its_helper() -> None:
    from deepspeed.launcher.launcher_helper import env_mapping

    task = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
    environ = env_mapping(dict(task), ["PMIX_RANK", "PMI_RANK"], ["PALS_LOCAL_RANKID", "MPI_LOCALRANKID"])
    launch = detect_launch({**environ, "MASTER_PORT": "99"})
    assert (launch.rank, launch.local_rank, launch.world_size, launch.master_port) == (3, 1, 4, 99)


# ------------------------------------------------------------ 4: DS_ENV_FILE


@pytest.mark.parametrize("value", ["a b", "tcp;sm", "x,y", "a b,c d", "plain", "100%"])
def test_damaged_variables_are_mended(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_env").write_text(f"NCCL_X={value}\nnoise\n")
    monkeypatch.chdir(tmp_path)
    words = command("openmpi", exports=(("NCCL_X", value),))
    arrived = next(word for word in words if word.startswith("NCCL_X=")).partition("=")[2]
    environ = {"DS_ENV_FILE": "ds_env", "NCCL_X": arrived}
    remarks = mend_variables(launched("mpirun"), environ)
    assert environ["NCCL_X"] == value
    assert len(remarks) == (arrived != value)
    # srun cuts its --export at commas
    exported = next(word for word in command("slurm", exports=(("NCCL_X", value),)) if word.startswith("--export"))
    environ = {"DS_ENV_FILE": "ds_env", "NCCL_X": exported.split(",")[1].partition("=")[2]}
    is_damaged = environ["NCCL_X"] != value
    remarks = mend_variables(launched("srun"), environ)
    assert environ["NCCL_X"] == value
    assert len(remarks) == is_damaged
    if is_damaged:
        assert "has damaged NCCL_X of ds_env" in remarks[0]
        assert "export NCCL_X before `deepspeed`" in remarks[0]


def test_what_the_user_has_set_otherwise_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".deepspeed_env").write_text("NCCL_X=a b\n")
    monkeypatch.chdir(tmp_path)
    for launcher, found in (("mpirun", "other"), ("deepspeed", '"a b"')):
        environ = {"NCCL_X": found}
        assert mend_variables(launched(launcher), environ) == []
        assert environ == {"NCCL_X": found}


# ------------------------------------------------------------ 5: one remote host


def test_one_remote_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_launcher.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("192.0.2.7", 0))])
    elsewhere = parse_launcher(local_launcher(world={"node7": [0, 1]}))
    assert elsewhere is not None
    with pytest.raises(LaunchError, match=r"only host asked for is node7 .* where it was called: .* add --force_multi"):
        require_right_host(elsewhere)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        ({"localhost": [0, 1]}, ()),
        ({deepspeed_launcher.socket.gethostname(): [0]}, ()),
        ({"127.0.0.1": [0]}, ()),
        ({"a-name-that.only.ssh.knows.invalid": [0]}, ()),  # nothing can be said
        ({"192.0.2.7": [0]}, ("--node_rank=0",)),  # started there by pdsh, or without ssh
        (TWO_HOSTS, ("--node_rank=1",)),
    ],
)
def test_all_else_is_let_pass(
    world: dict[str, list[int]], options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *_: object) -> list:
        if not host[0].isdigit():
            raise OSError("unknown")
        return [(2, 1, 6, "", (host, 0))]

    monkeypatch.setattr(deepspeed_launcher.socket, "getaddrinfo", resolve)
    own = parse_launcher(local_launcher(*options, world=world))
    assert own is not None
    assert own.world == world
    require_right_host(own)


def test_the_rank_finds_the_launcher_that_has_started_it(tmp_path: Path) -> None:
    """What `deepspeed --include 192.0.2.7` runs, here: the rank itself says what is wrong."""
    script = tmp_path / "rank.py"
    script.write_text("from megagpt.parallel.deepspeed_launcher import find_launch\nfind_launch()\n")
    words = local_launcher(world={"192.0.2.7": [0]})
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [*words[: words.index("--module")], str(script)]
    told = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=150, check=False)
    assert told.returncode != 0
    assert "the only host asked for is 192.0.2.7" in told.stderr, told.stderr


# ------------------------------------------------------------ 6: --launcher_args


def test_launcher_args_need_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--launcher_args", "-N2")
    assert "expected one argument" in capsys.readouterr().err
    assert arguments("--launcher_args=-N2").launcher_args == "-N2"


# ------------------------------------------------------------ 7, 8: pdsh


def process(words: list[str], **environ: str) -> SimpleNamespace:
    return SimpleNamespace(cmdline=lambda: words, environ=lambda: environ)


@pytest.mark.parametrize(
    ("environ", "configuration", "expected"),
    [
        ({}, "serveraliveinterval 0", 1),
        ({"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"}, "serveraliveinterval 0", 0),
        ({"PDSH_SSH_ARGS_APPEND": "-p 2222"}, "serveraliveinterval 0", 1),
        ({}, "host node1\nserveraliveinterval 15", 0),
    ],
)
def test_a_pdsh_that_would_wait_for_ever_is_told(environ, configuration, expected, tmp_path, monkeypatch) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\nprintf '{configuration}\n'\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    own = parse_launcher(local_launcher("--node_rank=0"))
    other = parse_launcher(local_launcher("--node_rank=0", world={"node8": [0], "node9": [0]}))
    assert own is not None
    assert other is not None
    pdsh = process(["pdsh", "-S", "-w", "node1,node2", " ".join(local_launcher("--node_rank=%n"))], **environ)
    remarks = pdsh_without_questions(own, [process(["bash"]), pdsh])
    assert len(remarks) == expected
    assert all("ServerAliveInterval=5" in remark for remark in remarks)
    assert pdsh_without_questions(other, [pdsh]) == []


def test_pdsh_would_end_other_jobs_which_is_told() -> None:
    pattern = command("pdsh")[-1].replace("\\ ", " ")
    mine, others = local_launcher("--node_rank=0", port=1111), local_launcher("--node_rank=0", port=2222)
    assert re.search(pattern, " ".join(mine))
    assert re.search(pattern, " ".join(others)), "DeepSpeed now tells jobs apart: the remark can go"
    own = parse_launcher(mine)
    assert own is not None
    twins = [process(mine), process(local_launcher("--node_rank=0", port=1111)), process(["python", "train.py"])]
    assert launchers_of_other_jobs(own, twins) == []
    (remark,) = launchers_of_other_jobs(own, [*twins, process(others)])
    assert "has other jobs of DeepSpeed's launcher (master port 2222)" in remark
    alone = parse_launcher(local_launcher(port=1111))  # on one host there is no pdsh
    assert alone is not None
    assert launchers_of_other_jobs(alone, [process(others)]) == []


def test_nothing_is_said_of_other_launchers_nor_looked_at_for_long() -> None:
    started = time.monotonic()
    for launcher in ("torchrun", "srun", "mpirun", "single process", "deepspeed"):
        assert inspect_launcher(launched(launcher), {}) == []
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "words", [["python", "train.py"], ["python", "-m", "deepspeed.launcher.launch", "--world_info=%%"], []]
)
def test_other_processes_are_no_launchers(words: list[str]) -> None:
    assert parse_launcher(words) is None
