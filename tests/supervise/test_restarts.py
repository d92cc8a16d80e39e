"""When a job is started again, when not, and where, seen with stand-ins for Slurm's commands."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from megagpt.errors import LaunchError, StorageError
from megagpt.plan import run_config_from_dict
from megagpt.storage import location
from megagpt.supervise import restarts, slurm
from megagpt.supervise.beats import BeatFolder, Verdict
from megagpt.supervise.restarts import begin, end, newest_step
from megagpt.supervise.watchdog import Limits, Place, Watchdog

MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 8,
}
NODES = "".join(f"node{number}|idle|8|64000|gpu:4|(null)\\n" for number in (1, 2, 3))
AWAY = """
        # As many times as the file `away` has lines, the controller does not answer.
        if [[ $1 != update && -s away ]]; then
          sed -i 1d away; echo "slurm error: Unable to contact slurm controller (connect failure)" >&2; exit 1
        fi
        """
STAND_INS = {
    "squeue": AWAY
    + """
        if [[ $* == *--user* ]]; then printf "%b" "${QUEUE:-}"; exit; fi
        cat state 2>/dev/null || echo "${JOB_STATE:-RUNNING}" """,
    "sinfo": 'printf "%b" "$NODES"',
    "scontrol": AWAY
    + """
        if [[ $1 == update ]]; then echo "$@" >>updated; exit; fi
        if [[ $1 == requeue && -n ${REFUSES:-} ]]; then echo "$REFUSES" >&2; exit 1; fi
        if [[ $1 == requeue ]]; then echo "$@" >>requeued; exit; fi
        if [[ $* == *hostnames* ]]; then echo "${@: -1}" | tr , '\\n'; exit; fi
        echo "JobId=77 JobName=mega Partition=main ReqNodeList=(null) ExcNodeList=(null) NumNodes=2" \\
          "Features=(null) Command=/repo/slurm/pretrain.sbatch run.yaml ds.json data.split=[90, 10, 0]" """,
}


class Job:
    """A run in a folder, and the Slurm job that it runs in."""

    def __init__(self, folder: Path):
        self.folder = folder
        tree = {
            "model": MODEL,
            "training": {"steps": 10},
            "checkpoint": {"directory": str(folder / "checkpoints")},
            "logging": {"directory": str(folder / "logs")},
        }
        self.run = run_config_from_dict(tree)
        self.environ = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2"}

    def save(self, step: int) -> None:
        path = self.folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.sha256").touch()

    def verdict(self, kind: str, hosts: list[str], text: str = "") -> None:
        folder = BeatFolder(self.folder / "logs" / "watchdog" / f"start-{kind}")
        folder.create()
        folder.pass_verdict(Verdict(kind=kind, by=0, text=text, culprits=[1], hosts=hosts, exit_code=75))

    def said(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def ended(run, most_idle: int, status: int, environ, may_requeue: bool = True) -> tuple[int, str]:
    """Exit status and words of an end."""
    said: list[str] = []
    return end(run, most_idle, status, may_requeue, environ, said.append), "".join(said)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("NODES", NODES)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(restarts, "PAUSES", (0.0, 0.0))
    return Job(tmp_path)


def test_a_stopped_run_is_queued_again_and_a_finished_one_is_not(job: Job) -> None:
    begin(job.run, 3, job.environ)
    job.save(4)
    assert newest_step(job.run) == 4 < job.run.training.steps
    assert ended(job.run, 3, 0, job.environ) == (0, "job 77 is queued again and goes on from step 4")
    assert job.said("requeued") == ["requeue 77"]
    job.save(10)
    assert newest_step(job.run) == 10 == job.run.training.steps
    starts = len((job.folder / "checkpoints" / "restarts.jsonl").read_text().splitlines())
    assert begin(job.run, 0, job.environ) == "", "its ranks see whether the last checkpoint is whole"
    assert len((job.folder / "checkpoints" / "restarts.jsonl").read_text().splitlines()) == starts
    assert ended(job.run, 3, 0, job.environ) == (0, "the run is finished at step 10")
    assert len(job.said("requeued")) == 1


@pytest.mark.parametrize(("status", "expected"), [(0, 75), (75, 75), (1, 1)])
def test_jobs_that_depend_on_it_do_not_take_an_unfinished_run_for_finished(
    job: Job, monkeypatch: pytest.MonkeyPatch, status: int, expected: int
) -> None:
    begin(job.run, 3, job.environ)
    job.save(4)
    words = "the run has come to step 4 of 10; submit it again, and it goes on from there"
    assert ended(job.run, 3, status, job.environ, may_requeue=False) == (expected, words)
    assert job.said("requeued") == []
    monkeypatch.setenv("REFUSES", "Requested operation is presently disabled for job 77")
    words = "Slurm does not queue job 77 again, as printed above; submit it again: it goes on from step 4"
    assert ended(job.run, 3, status, job.environ) == (expected, words)
    monkeypatch.setenv("JOB_STATE", "COMPLETING")
    assert ended(job.run, 3, status, job.environ)[0] == expected


@pytest.mark.parametrize("times", [1, 3])
def test_a_controller_that_is_away_for_a_moment_is_asked_again(job: Job, times: int) -> None:
    begin(job.run, 3, job.environ)
    job.folder.joinpath("away").write_text("\n" * times)
    assert ended(job.run, 3, 75, job.environ) == (0, "job 77 is queued again and goes on from step 0")
    assert job.said("requeued") == ["requeue 77"]
    assert job.said("away") == []


def test_a_controller_that_stays_away_is_not_taken_for_one_that_has_cancelled_the_job(job: Job, capfd) -> None:
    begin(job.run, 3, job.environ)
    job.folder.joinpath("away").write_text("\n" * 100)
    assert ended(job.run, 3, 0, job.environ) == (
        75,
        "Slurm does not answer `squeue --noheader ...`, as printed above; unless it queues the job again, submit it "
        "again: it goes on from step 0",
    )
    assert capfd.readouterr().err.count("Unable to contact slurm controller") == 4


def test_a_requeue_whose_answer_was_lost_has_taken_place(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(job.run, 3, job.environ)
    path = job.folder / "bin" / "scontrol"
    lost = "if [[ $1 == requeue ]]; then echo PENDING >state; fi\n"
    path.write_text(path.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{lost}"))
    monkeypatch.setenv("REFUSES", "Job is pending execution for job 77")
    assert ended(job.run, 3, 75, job.environ) == (0, "job 77 is queued again and goes on from step 0")


def test_a_store_that_is_away_at_the_end_is_looked_at_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(job.run, 3, job.environ)
    errors = [StorageError("away", 75), OSError(errno.ESTALE, "stale")]

    def newest(run) -> int:
        if errors:
            raise errors.pop()
        return 4

    monkeypatch.setattr(restarts, "newest_step", newest)
    assert ended(job.run, 3, 75, job.environ) == (0, "job 77 is queued again and goes on from step 4")
    errors[:] = [StorageError("refused")]
    with pytest.raises(StorageError, match="refused"):
        ended(job.run, 3, 75, job.environ)


def test_starts_that_cannot_be_noted_are_bounded_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "no disk")

    for count, expected in enumerate((0, 0, 75)):
        environ = {**job.environ, "SLURM_RESTART_COUNT": str(count)}
        with monkeypatch.context() as patch:
            patch.setattr(restarts, "_note", refuse)
            with pytest.raises(StorageError, match="no disk") as caught:
                begin(job.run, 3, environ)
        assert caught.value.exit_code == 75
        assert ended(job.run, 3, 75, environ)[0] == expected


def test_a_chain_goes_on_without_the_node_that_failed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = ("77|(null)|p a", "78|afterany:77(unfulfilled)|p a", "79|afterany:78(unfulfilled)|p a")
    monkeypatch.setenv("QUEUE", "\\n".join(waiting))
    begin(job.run, 3, job.environ)
    job.save(4)
    assert ended(job.run, 3, 0, job.environ, may_requeue=False) == (0, "job 78 goes on from step 4")
    job.verdict("lost", ["node2"])
    assert ended(job.run, 3, 75, job.environ, may_requeue=False) == (75, "job 78 goes on from step 4 without node2")
    assert job.said("updated") == [f"update JobId={number} ExcNodeList=node2" for number in (78, 79)]
    assert job.said("requeued") == []


def test_a_crash_loop_is_bounded_whether_or_not_the_end_is_reached(job: Job) -> None:
    job.save(4)
    for _ in range(2):
        begin(job.run, 3, job.environ)
        assert ended(job.run, 3, 1, job.environ)[0] == 0
    begin(job.run, 3, job.environ)
    assert ended(job.run, 3, 1, job.environ) == (1, "not started again: 3 starts in a row have not got beyond step 4")
    with pytest.raises(LaunchError, match="the last 3 starts of this job all began at step 4"):
        begin(job.run, 3, job.environ)
    begin(job.run, 3, {**job.environ, "SLURM_JOB_ID": "90"})  # submitted anew by hand


def test_progress_starts_the_count_afresh(job: Job) -> None:
    for step in (1, 2, 3, 4, 5):
        begin(job.run, 2, job.environ)
        job.save(step)
        assert ended(job.run, 2, 1, job.environ)[0] == 0


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [(2, "RUNNING", "one to be mended"), (143, "COMPLETING", "was cancelled"), (1, "", "")],
)
def test_what_a_user_has_to_mend_or_has_cancelled_is_left_alone(
    job: Job, monkeypatch: pytest.MonkeyPatch, status: int, state: str, words: str
) -> None:
    begin(job.run, 3, job.environ)
    if state:
        monkeypatch.setenv("JOB_STATE", state)
    else:
        del job.environ["SLURM_JOB_ID"]
    code, said = ended(job.run, 3, status, job.environ)
    assert (code, job.said("requeued")) == (status, [])
    assert words in said


def test_the_node_that_failed_is_left_out(job: Job) -> None:
    begin(job.run, 3, job.environ)
    job.verdict("lost", ["node2"])
    assert ended(job.run, 3, 75, job.environ) == (0, "job 77 is queued again and goes on from step 0 without node2")
    assert job.said("requeued") == ["requeue 77"]
    assert job.said("updated") == ["update JobId=77 ExcNodeList=node2"]


def test_a_verdict_names_hosts_as_slurm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node2.cluster.example")
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    place = Place(rank=0, world_size=1, stage=0, data=0, context=0, tensor=0)
    watchdog = Watchdog(BeatFolder(tmp_path), place, Limits(stuck=9.0), say=lambda text: None)
    assert watchdog.failed("CUDA error: the GPU has fallen off the bus", 75).hosts == ["node2"]


def test_the_next_start_tells_what_has_ended_the_one_before(job: Job) -> None:
    assert begin(job.run, 3, job.environ) == ""
    job.verdict("lost", ["node1"], "rank 0 on node1 does not run any more")
    told = begin(job.run, 3, job.environ)
    assert told == "the start before this one was ended: rank 0 on node1 does not run any more"
    assert begin(job.run, 3, job.environ) == ""  # it was another start's


def test_the_last_start_is_told_by_the_files_not_by_the_names(job: Job) -> None:
    begin(job.run, 3, job.environ)
    job.verdict("unreliable", ["node3"])  # by its name the later one
    job.verdict("lost", ["node2"])
    folders = job.folder / "logs" / "watchdog"
    now = time.time()
    os.utime(folders / "start-unreliable", (now + 1, now + 1))
    os.utime(folders / "start-lost", (now + 2, now + 2))
    assert ended(job.run, 3, 75, job.environ)[1].endswith("goes on from step 0 without node2")


def test_without_enough_other_nodes_the_job_keeps_its_own_and_says_so(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(job.run, 3, job.environ)
    job.verdict("lost", ["node2"])
    monkeypatch.setenv("NODES", NODES.replace("node3|idle", "node3|down*"))
    code, said = ended(job.run, 3, 75, job.environ)
    assert (code, said.partition("; ")[0]) == (0, "job 77 is queued again and goes on from step 0")
    assert said.endswith(
        "; node2 may be among its nodes again: of nodes that serve as well 1 are up, and the job needs 2"
    )
    assert job.said("updated") == []


@pytest.mark.parametrize(("kind", "hosts"), [("failed", ["node2"]), ("lost", ["node1", "node2"])])
def test_no_node_is_blamed_for_a_bug_or_for_all(job: Job, kind: str, hosts: list[str]) -> None:
    begin(job.run, 3, job.environ)
    job.verdict(kind, hosts, "ZeroDivisionError")
    assert ended(job.run, 3, 75, job.environ)[1] == "job 77 is queued again and goes on from step 0"


def test_a_run_without_checkpoints_is_not_looked_after(job: Job) -> None:
    run = job.run.model_copy(update={"checkpoint": job.run.checkpoint.model_copy(update={"directory": None})})
    begin(run, 0, job.environ)
    assert ended(run, 0, 9, job.environ) == (9, "")


def test_starts_of_a_run_with_remote_checkpoints_are_counted_in_the_store() -> None:
    directory = location("memory://bucket/restarts")
    tree = {"model": MODEL, "training": {"steps": 10}, "checkpoint": {"directory": str(directory)}}
    run, environ = run_config_from_dict(tree), {"SLURM_JOB_ID": "77"}
    assert newest_step(run) == 0
    for name in ("step-00000004/manifest.sha256", "step-00000008/rank-00000.safetensors", "latest"):
        (directory / name).write_bytes(b"")
    assert newest_step(run) == 4, "the other one is not complete"
    begin(run, 2, environ)
    begin(run, 2, environ)
    with pytest.raises(LaunchError, match=r"memory://bucket/restarts/restarts.jsonl: the last 2 starts of this job"):
        begin(run, 2, environ)
