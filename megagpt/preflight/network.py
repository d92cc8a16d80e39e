"""Pairs of hosts: can they talk, how fast, and do their clocks agree. Plain sockets."""

import contextlib
import socket
import statistics
import struct
import time
from dataclasses import dataclass
from typing import Any

from megagpt.parallel.interface import own_address
from megagpt.preflight.findings import Finding, failed, ok, warning
from megagpt.preflight.meeting import Meeting
from megagpt.preflight.tournament import Tournament

SLOWEST_MBIT = 200.0
"""Below this a link is slow whatever the others are."""
SLOW_SHARE = 0.3
"""Of the median link's speed."""
LARGEST_SKEW = 1.0
_BYTES = 8 << 20
_TRIALS = 3
"""The best one counts: a busy processor is no slow link."""
_LONG = 2.0
"""Seconds after which a trial is not repeated."""
_CHUNK = 1 << 20
_SECONDS = 20.0
"""For each answer of the other side."""
_MOST_TRANSFER_SECONDS = 60.0
_MOST_SECONDS = 2 * _SECONDS + _MOST_TRANSFER_SECONDS


@dataclass(frozen=True)
class Link:
    """What one host has measured towards another one."""

    source: str
    target: str
    problem: str | None
    mbit: float
    skew: float
    """Target's clock minus the source's, in seconds."""


def measure_links(meeting: Meeting, leaders: dict[str, int], host: str, tournament: Tournament) -> list[Link]:
    """Try pairs of hosts, those of a round all at once; only the leaders take part, and all get all links.

    Args:
        meeting: of all ranks.
        leaders: first rank of each host.
        host: of this rank.
        tournament: says which pairs.
    """
    links: list[Link] = []
    with socket.create_server(("", 0), backlog=64) as server:
        server.settimeout(_SECONDS)
        address = own_address(meeting.launch.master_addr) or socket.gethostname()
        addresses = meeting.gather("address", [address, server.getsockname()[1]], _SECONDS, leaders.values())
        for pairs in tournament.rounds():
            link = None
            for source, target in pairs:
                if host == target:
                    _serve(server)
                if host == source and leaders[target] in addresses:
                    link = _measure(source, target, tuple(addresses[leaders[target]]))
            said = meeting.gather("links", link and vars(link), _MOST_SECONDS, leaders.values())
            found = [Link(**fields) for fields in said.values() if fields]
            for link in found:
                if link.problem:
                    tournament.failed((link.source, link.target))
            links += found
    return links


def judge_links(links: list[Link], num_hosts: int, extent: str) -> list[Finding]:
    """Findings about reach, speed and clocks.

    Args:
        links: that were measured.
        num_hosts: of the job.
        extent: how many pairs they are, of how many.
    """
    if num_hosts == 1:
        return [ok("network", "one host")]
    broken = [link for link in links if link.problem]
    fine = [link for link in links if not link.problem]
    findings = [
        failed("network", f"{link.source} cannot reach {link.target}: {link.problem}",
               "open all ports between the nodes, or name the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)")
        for link in broken
    ]  # fmt: skip
    median = statistics.median(link.mbit for link in fine) if fine else 0.0
    slow = [link for link in fine if link.mbit < max(SLOWEST_MBIT, SLOW_SHARE * median)]
    findings += [
        warning("network", f"{link.source} to {link.target}: {link.mbit:,.0f} Mbit/s (median {median:,.0f})",
                "look at this link's cable, port and interface; a job is as fast as its slowest link")
        for link in slow
    ]  # fmt: skip
    if not findings:
        findings.append(ok("network", f"{extent} reach each other, {median:,.0f} Mbit/s over TCP"))
    skewed = [link for link in fine if abs(link.skew) > LARGEST_SKEW]
    findings += [
        warning("clocks", f"{link.target} is {link.skew:+.1f} s off {link.source}", "synchronise clocks (chrony)")
        for link in skewed
    ]
    if fine and not skewed:
        findings.append(ok("clocks", f"within {max(abs(link.skew) for link in fine):.3f} s"))
    return findings


def _serve(server: socket.socket) -> None:
    """Answer one measurement: the time, then as many bytes as are sent are taken."""
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_SECONDS)
            for _ in range(3):
                _receive(connection, 1)
                connection.sendall(struct.pack("!d", time.time()))
            left, ends_at = _BYTES, time.monotonic() + _MOST_TRANSFER_SECONDS
            while (got := len(connection.recv(min(left, _CHUNK)))) and time.monotonic() < ends_at:
                left -= got
                if left == 0:
                    connection.sendall(b"!")
                    left = _BYTES


def _measure(source: str, target: str, where: Any) -> Link:
    try:
        with socket.create_connection(where, timeout=_SECONDS) as connection:
            best, skew = float("inf"), 0.0
            for _ in range(3):
                sent = time.time()
                connection.sendall(b"?")
                (theirs,) = struct.unpack("!d", _receive(connection, 8))
                back = time.time()
                if back - sent < best:
                    best, skew = back - sent, theirs - (sent + back) / 2
            seconds = _best_transfer(connection)
    except OSError as error:
        text = f"{where[0]} port {where[1]}: {error.strerror or error}"
        return Link(source, target, text, 0.0, 0.0)
    return Link(source, target, None, _BYTES * 8 / seconds / 1e6, skew)


def _best_transfer(connection: socket.socket) -> float:
    block, best, ends_at = bytes(_CHUNK), float("inf"), time.monotonic() + _MOST_TRANSFER_SECONDS
    for _ in range(_TRIALS):
        started = time.monotonic()
        for _ in range(_BYTES // _CHUNK):
            connection.sendall(block)
            if time.monotonic() > ends_at:
                raise OSError(f"{_BYTES >> 20} MiB have not gone through within {_MOST_TRANSFER_SECONDS:.0f} s")
        _receive(connection, 1)
        best = min(best, time.monotonic() - started)
        if best > _LONG:
            break
    return best


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise OSError("the other side has closed the connection")
        data += part
    return data
