"""The whole examination, in one process or in all ranks of a job."""

import contextlib
import os
import socket
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import LaunchError
from megagpt.parallel.interface import choose_interface
from megagpt.parallel.launch import Launch
from megagpt.parallel.ranks import gpu_index
from megagpt.plan import Plan
from megagpt.preflight.findings import Finding, failed, merged, ok
from megagpt.preflight.host import check_host, nearest_folder, versions
from megagpt.preflight.meeting import Meeting
from megagpt.preflight.network import Link, judge_links, measure_links
from megagpt.storage import RemotePath, location

COLLECTIVE_SECONDS = 60.0


def examine(plan: Plan, launch: Launch) -> list[Finding]:
    """Examine this host, or all hosts of the job; all ranks take part, and rank 0 gets the findings.

    Args:
        plan: of the run.
        launch: this process's place.
    """
    host = socket.gethostname()
    if launch.world_size == 1:
        return [*check_host(plan, plan.world_size), ok("versions", _words(versions()))]
    try:
        meeting = Meeting(launch)
    except LaunchError as error:
        return [failed("meeting", str(error), "nothing else could be tried")]
    hosts = meeting.gather("host", host)
    leaders = {name: hosts.index(name) for name in dict.fromkeys(hosts)}
    is_leader = leaders[host] == launch.rank
    findings = [check.model_dump() for check in check_host(plan, hosts.count(host))] if is_leader else []
    by_host = meeting.gather("findings", findings)
    libraries = meeting.gather("versions", versions() if is_leader else {})
    shared = _check_shared(plan, meeting, leaders, host)
    links = measure_links(meeting, leaders, host) if is_leader and len(leaders) > 1 else []
    measured = meeting.gather("links", [vars(link) for link in links])
    network = judge_links([Link(**link) for part in measured for link in part], len(leaders))
    if any(finding.status == "failed" for finding in network):
        collectives = [failed("collectives", "not tried", "mend the network first")]
    else:
        collectives = _check_collectives(meeting, hosts)
    local = {name: [Finding.model_validate(f) for f in by_host[rank]] for name, rank in leaders.items()}
    alike = _check_alike({name: libraries[rank] for name, rank in leaders.items()})
    meeting.part()
    return [*merged(local), *alike, *shared, *network, *collectives]


def _words(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if name != "source")


def _check_alike(by_host: dict[str, dict[str, str]]) -> list[Finding]:
    """Versions that differ, by host; the most frequent one is taken for the intended one."""
    findings = []
    for name in dict.fromkeys(name for found in by_host.values() for name in found):
        values = {host: found.get(name, "missing") for host, found in by_host.items()}
        if len(set(values.values())) > 1:
            usual = Counter(values.values()).most_common(1)[0][0]
            odd = ", ".join(f"{host} has {value}" for host, value in values.items() if value != usual)
            what = "the files of megagpt" if name == "source" else name
            findings.append(
                failed("versions", f"{what}: {odd}, others {usual}", "use one environment and one copy on all nodes")
            )
    return findings or [ok("versions", "alike everywhere: " + _words(next(iter(by_host.values()))))]


def _check_shared(plan: Plan, meeting: Meeting, leaders: dict[str, int], host: str) -> list[Finding]:
    """Each host writes a file into each folder of the run, and all hosts look for all of them."""
    folders = {
        "checkpoint.directory": plan.run.checkpoint.directory,
        "logging.directory": plan.run.logging.directory,
    }
    is_leader = leaders[host] == meeting.launch.rank
    findings = []
    for key, directory in folders.items():
        if directory is None or len(leaders) == 1 or isinstance(location(directory), RemotePath):
            continue
        mine = f".megagpt-doctor-{os.getpid()}-{time.time_ns()}"
        folder = nearest_folder(directory)
        problem = _write(folder / mine, host) if is_leader else ""
        names = meeting.gather(f"shared/{key}", [mine, problem])
        unseen = [name for name, rank in leaders.items() if is_leader and not _read(folder / names[rank][0], name)]
        seen = meeting.gather(f"seen/{key}", unseen)
        if is_leader:
            with contextlib.suppress(OSError):
                (folder / mine).unlink()
        problems = [names[rank][1] for rank in leaders.values() if names[rank][1]]
        split = [
            f"{name} does not see the file of {', '.join(seen[rank])}" for name, rank in leaders.items() if seen[rank]
        ]
        if problems or split:
            findings.append(failed(f"shared: {key}", "; ".join(problems or split[:4]) + f" in {folder}",
                                   "give a folder of a file system that all nodes share"))  # fmt: skip
        else:
            findings.append(ok(f"shared: {key}", f"{folder} is one folder on all {len(leaders)} hosts"))
    return findings


def _write(path: Path, text: str) -> str:
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{text} cannot write: {error.strerror}"
    return ""


def _read(path: Path, expected: str) -> bool:
    """Whether a file is there with its content; network file systems may take a moment."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == expected:
                return True
        time.sleep(0.2)
    return False


def _check_collectives(meeting: Meeting, hosts: list[str]) -> list[Finding]:
    """Sums over all ranks by the backend that the run would take."""
    launch = meeting.launch
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    device: Any = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", gpu_index(launch.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    problem, seconds = "", 0.0
    try:
        choose_interface(launch.master_addr)
        dist.init_process_group(
            backend, store=dist.PrefixStore("collectives", meeting._store), rank=launch.rank,
            world_size=launch.world_size, timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )  # fmt: skip
        values = torch.full((1 << 20,), float(launch.rank + 1), device=device)
        dist.all_reduce(values)
        started = time.monotonic()
        values = torch.full((1 << 20,), float(launch.rank + 1), device=device)
        dist.all_reduce(values)
        expected = launch.world_size * (launch.world_size + 1) / 2
        if float(values.min()) != expected or float(values.max()) != expected:
            problem = f"a sum over all ranks came out as {float(values.min()):g} ... {float(values.max()):g}"
        seconds = time.monotonic() - started
        dist.destroy_process_group()
    except (LaunchError, RuntimeError, dist.DistError) as error:
        problem = str(error).strip().splitlines()[0]
    said = meeting.gather("collectives", problem)
    wrong = [f"rank {rank} on {hosts[rank]}: {text}" for rank, text in enumerate(said) if text]
    if wrong:
        advice = (
            "name the interface between the nodes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and see NCCL_DEBUG=INFO"
        )
        return [failed("collectives", f"{backend}: " + "; ".join(wrong[:3]), advice)]
    return [
        ok("collectives", f"{backend}: sums over {launch.world_size} ranks are right, 4 MiB in {seconds * 1e3:.1f} ms")
    ]
