"""What the doctor must find: faults of one node, planted on the running cluster and taken away again."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from bed import Cluster
from drilling import ENDED
from small_runs import OPTIONS, Run, output_option

NODE = "node2"
PATIENCE = 60
"""Seconds that the doctor gives ranks to come."""


def _on(cluster: Cluster, *command: str, host: str = NODE) -> str:
    return cluster.run(host, *command)


def _shell(cluster: Cluster, text: str, host: str = NODE) -> str:
    return cluster.run(host, "bash", "-ec", text)


@dataclass(frozen=True)
class Ailment:
    """A fault, the finding that it must lead to, and how it is taken away."""

    plant: Callable[[Cluster, Run], object]
    cure: Callable[[Cluster, Run], object]
    check: str
    status: str
    words: str
    """A pattern for the finding's text."""
    overrides: tuple[str, ...] = ()
    """Of the run config, for the doctor."""
    variables: str = ""
    """For the job, `NAME=value,...`."""
    group: int | None = 1
    """Those of one group do not hide each other; None: it hides all others, and takes a minute."""

    def is_in(self, findings: list[dict[str, str]]) -> bool:
        """Whether the doctor has found it."""
        return any(
            found["check"] == self.check
            and re.fullmatch(self.status, found["status"])
            and re.search(self.words, found["text"])
            for found in findings
        )


def _other_version(cluster: Cluster, run: Run) -> None:
    found = distribution("safetensors")
    (path,) = (Path(str(file.locate())) for file in found.files or () if file.name == "METADATA")
    text = path.read_text().replace(f"\nVersion: {found.version}\n", "\nVersion: 0.0.9\n", 1)
    other = run.folder / "METADATA"
    other.write_text(text)
    _on(cluster, "mount", "--bind", str(other), str(path))


def _old_copy(cluster: Cluster, run: Run) -> None:
    other = run.folder / "errors.py"
    other.write_text((cluster.root / "megagpt/errors.py").read_text() + "\n# older\n")
    _on(cluster, "mount", "--bind", str(other), str(cluster.root / "megagpt/errors.py"))


def _metadata(cluster: Cluster, run: Run) -> None:
    (path,) = (str(file.locate()) for file in distribution("safetensors").files or () if file.name == "METADATA")
    _on(cluster, "umount", path)


def _slow(cluster: Cluster, run: Run) -> None:
    for host in cluster.nodes[:2]:
        _shell(cluster, "tc qdisc add dev eth0 root tbf rate 20mbit burst 32k latency 400ms", host)


def _fast(cluster: Cluster, run: Run) -> None:
    for host in cluster.nodes[:2]:
        _shell(cluster, "tc qdisc del dev eth0 root", host)


def _close(ports: str, host: str = NODE) -> Callable[[Cluster, Run], object]:
    """As a firewall that lets known services in only; what is open stays open, and a host reaches itself."""
    rule = f"iif != lo tcp dport {ports} tcp flags & (syn | ack) == syn drop"
    chain = "input { type filter hook input priority 0; }"
    words = f"add table inet closed; add chain inet closed {chain}; add rule inet closed input {rule}"
    return lambda cluster, run: _on(cluster, "nft", words, host=host)


def _open(host: str = NODE) -> Callable[[Cluster, Run], object]:
    return lambda cluster, run: _on(cluster, "nft", "delete table inet closed", host=host)


def _few_files(cluster: Cluster, run: Run) -> None:
    _shell(cluster, 'prlimit --pid "$(</run/slurmd.pid)" --nofile=512:512')


def _restart_slurmd(cluster: Cluster, run: Run) -> None:
    """A limit that was lowered cannot be raised again."""
    cluster.control("stop-slurmd", NODE)
    cluster.control("start-slurmd", NODE)


AILMENTS = {
    "another version of a library": Ailment(
        _other_version, _metadata, "versions", "failed", "safetensors: node2 has 0.0.9, others "
    ),
    "an older copy of megagpt": Ailment(
        _old_copy,
        lambda cluster, run: _on(cluster, "umount", str(cluster.root / "megagpt/errors.py")),
        "versions",
        "failed",
        "the files of megagpt: node2 has ",
    ),
    "a folder that is not shared": Ailment(
        lambda cluster, run: _shell(cluster, f"mkdir -p {run.folder}/logs; mount -t tmpfs none {run.folder}/logs"),
        lambda cluster, run: _on(cluster, "umount", f"{run.folder}/logs"),
        "shared: logging.directory",
        "failed",
        "node1 does not see the file of node2; node2 does not see the file of node1",
    ),
    "a full disk": Ailment(
        lambda cluster, run: _shell(cluster, f"head -c 1G /dev/zero >{cluster.disk}/filler || true"),
        lambda cluster, run: _shell(cluster, f"rm {cluster.disk}/filler"),
        "disk",
        "failed",
        "3 checkpoints of .* GiB free in ",
        overrides=("checkpoint.directory={disk}/checkpoints",),
    ),
    "a folder that cannot be written to": Ailment(
        lambda cluster, run: _shell(
            cluster, f"mkdir -p {run.folder}/logs; mount --bind -o ro {run.folder}/logs {run.folder}/logs"
        ),
        lambda cluster, run: _on(cluster, "umount", f"{run.folder}/logs"),
        "shared: logging.directory",
        "failed",
        "node2 cannot write: Read-only file system",
        group=2,
    ),
    "a dataset that is missing": Ailment(
        lambda cluster, run: _shell(cluster, f"mount -t tmpfs none {cluster.folder.parent}/data"),
        lambda cluster, run: _on(cluster, "umount", f"{cluster.folder.parent}/data"),
        "data",
        "failed",
        "node2: tokenizer .* does not exist",
    ),
    "few open files": Ailment(
        _few_files,
        _restart_slurmd,
        "limits",
        "warning",
        "node2: only 512 open files",
    ),
    "little shared memory": Ailment(
        lambda cluster, run: _on(cluster, "mount", "-o", "remount,size=64m", "/dev/shm"),
        lambda cluster, run: _on(cluster, "mount", "-o", "remount,size=2g", "/dev/shm"),
        "shared memory",
        "warning",
        "node2: /dev/shm has 0.06 GiB free",
    ),
    "a clock that is wrong": Ailment(
        lambda cluster, run: None,
        lambda cluster, run: None,
        "clocks",
        "failed|warning",
        r"node2 is \+40.\d s off node1",
        variables="DRILL_CLOCK=node2:40",
    ),
    "too little memory for the plan": Ailment(
        lambda cluster, run: None,
        lambda cluster, run: None,
        "memory",
        "failed",
        "GiB estimated per rank",
        overrides=("model.hidden_size=16384", "model.num_layers=64"),
        group=2,
    ),
    "closed ports": Ailment(
        _close("32768-65535"),  # what the system hands out; Slurm's own are below
        _open(),
        "network",
        "failed",
        "node1 cannot reach node2: .* port [0-9]+: .*",
        group=2,
    ),
    "the port closed at which ranks meet": Ailment(
        _close("20000-29999", "node1"),
        _open("node1"),
        "meeting",
        "failed",
        f"of 4 ranks 2 have not come to node1:2[0-9]+ within {PATIENCE} s: 2, 3; see what their hosts print",
        variables="MASTER_PORT=23456",
        group=None,
    ),
    "a slow link": Ailment(_slow, _fast, "network", "warning", "node1 to node2: .* Mbit/s"),
}


def examine(cluster: Cluster, run: Run, ailments: tuple[Ailment, ...] = ()) -> tuple[list[dict[str, str]], str]:
    """Have the doctor look at all nodes, with some faults planted: its findings, and what it printed."""
    found = run.folder / "doctor.json"
    found.unlink(missing_ok=True)
    overrides = [word.format(disk=cluster.disk) for ailment in ailments for word in ailment.overrides]
    path = f"PYTHONPATH={cluster.root}/tests/cluster/planted:{cluster.root}"
    variables = ",".join(["ALL", path, *(ailment.variables for ailment in ailments if ailment.variables)])
    arguments = [*run.arguments, f"--json {found}", f"--patience {PATIENCE}", *overrides]
    command = f"srun {sys.executable} tools/doctor.py {' '.join(arguments)}"
    words = (output_option(cluster), *OPTIONS, "--ntasks-per-node=2", f"--export={variables}", f"--wrap={command}")
    with contextlib.ExitStack() as planted:
        planted.callback(cluster.wait_until_idle)
        for ailment in ailments:
            planted.callback(ailment.cure, cluster, run)
            ailment.plant(cluster, run)
        job = cluster.submit(*words)
        cluster.wait_for(job, ENDED, 180)
    findings = json.loads(found.read_text()) if found.exists() else []
    return findings, cluster.output(job)
