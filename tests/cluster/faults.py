"""The faults that the project's runs must survive, or explain."""

import time

from drilling import START_SECONDS, Drill, Fault

RANK_2_OR_3 = r"error: rank [23] on node2 "
TRAIN = "megagpt[.]train"


def signal_a_rank(drill: Drill, number: str, host: str = "node2") -> None:
    """Send a signal to the last rank of a host."""
    found = drill.cluster.run(host, "pgrep", "-f", TRAIN).split()
    drill.cluster.run(host, "kill", f"-{number}", found[-1])


def ctl(drill: Drill, *words: str) -> None:
    result = drill.cluster.control(*words)
    assert result.returncode == 0, result.stderr


def cut_for(drill: Drill, seconds: float) -> None:
    """Pull node2's cable and put it in again."""
    ctl(drill, "cut-link", "node2")
    time.sleep(seconds)
    ctl(drill, "join-link", "node2")
    drill.wait_for_step(drill.run.step() + 2)


def slurm(*words: str):
    def inject(drill: Drill) -> None:
        drill.cluster.run("head", *words, drill.job)

    return inject


def damage_the_newest_checkpoint(drill: Drill) -> None:
    """Turn a bit of its largest file."""
    newest = max(drill.run.checkpoints.glob("step-*"))
    file = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def kill_and_damage(drill: Drill) -> None:
    """Kill a rank, and turn a bit of the newest checkpoint, not the only one, before the next start reads it.

    The run has come further than at the last time, or it would be given up.
    """

    def has_come_further() -> bool:
        there = sorted(path.name for path in drill.run.checkpoints.glob("step-*"))
        damaged = [path.name.removeprefix("damaged-") for path in drill.run.checkpoints.glob("damaged-step-*")]
        return len(there) > 1 and there[-1] > max(damaged, default="")

    while not has_come_further():
        drill.wait_for_step(drill.run.step() + 1)
    signal_a_rank(drill, "KILL")
    while drill.cluster.state(drill.job) == "RUNNING":
        time.sleep(0.1)
    damage_the_newest_checkpoint(drill)


def fill_disk(drill: Drill) -> None:
    """Leave no room where the checkpoints go."""
    drill.cluster.run("head", "bash", "-c", f"head -c 1G /dev/zero >{drill.cluster.disk}/filler; true")


def empty_disk(drill: Drill) -> None:
    """Make room again."""
    drill.cluster.run("head", "rm", str(drill.cluster.disk / "filler"))


FAULTS = {
    "rank killed": Fault(lambda drill: signal_a_rank(drill, "KILL"), RANK_2_OR_3 + "is gone: its process .*"),
    "rank stopped": Fault(
        lambda drill: signal_a_rank(drill, "STOP"),
        RANK_2_OR_3 + r"does not run any more: .*stopped by a signal \(SIGSTOP\)",
    ),
    "node lost": Fault(
        lambda drill: ctl(drill, "kill-node", "node2"),
        r"error: .*rank [23] on node2 does not run any more",
        mend=lambda drill: ctl(drill, "heal-node", "node2"),
        hurries=False,
    ),
    "node lost, another one free": Fault(
        lambda drill: ctl(drill, "kill-node", "node2"),
        r"error: .*rank [23] on node2 does not run any more",
        num_nodes=3,
        once=True,
    ),
    "first node lost, another one free": Fault(
        lambda drill: ctl(drill, "kill-node", "node1"),  # with what prints the job's output
        "the start before this one was ended: rank [01] on node1 does not run any more",
        then="on",
        num_nodes=3,
        patience=120.0,
        once=True,
    ),
    "link cut for 6 s": Fault(lambda drill: cut_for(drill, 6.0), "", then="on"),
    "link cut": Fault(
        lambda drill: ctl(drill, "cut-link", "node2"),
        "error: no rank has made progress .*look at the network between node1 and node2",
        mend=lambda drill: ctl(drill, "join-link", "node2"),
        hurries=False,
    ),
    "slurmd killed": Fault(
        lambda drill: ctl(drill, "stop-slurmd", "node2"),
        "NODE FAILURE|Node failure",
        mend=lambda drill: ctl(drill, "start-slurmd", "node2"),
        steps=60,
        once=True,
        hurries=False,
    ),
    "scancel": Fault(slurm("scancel"), "stopped by a signal|CANCELLED", then="by hand"),
    "requeue": Fault(slurm("scontrol", "requeue"), "stopped by a signal|REQUEUE"),
    "time limit": Fault(
        lambda drill: None,  # the batch file has the ranks warned two minutes before it
        "stopped by a signal; the same command goes on from here",
        options=("--time=4",),
        pace=1.6,
        steps=60,
        patience=180.0,
        once=True,
    ),
    "disk full": Fault(
        fill_disk,
        "error: .* could not be saved .* are free",
        then="by hand",
        mend=empty_disk,
        sections=(("checkpoint", {"directory": "{disk}/run-{run}"}),),
    ),
    "newest checkpoint damaged": Fault(
        kill_and_damage, "step-.*; this checkpoint is skipped and the next older one is tried", patience=START_SECONDS
    ),
    "nan once": Fault(
        lambda drill: None, "computed again from the same samples all is well", then="on", plant="nan:2:6"
    ),
    "nan that stays": Fault(lambda drill: None, "returns to the checkpoint", then="given up", plant="nan-stays:2:10"),
    "bit flipped": Fault(
        lambda drill: None,
        "differ from those of their data-parallel copies",
        plant="flip:3:6",
        sections=(("parallel", {"tensor_model_parallel_size": 1}), ("supervision", {"replica_check_interval": 1})),
    ),
}
