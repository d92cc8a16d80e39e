"""Every pair of hosts: can they talk, how fast, and do their clocks agree. Plain sockets, one pair at a time."""

import contextlib
import socket
import statistics
import struct
import time
from dataclasses import dataclass
from typing import Any

from megagpt.preflight.findings import Finding, failed, ok, warning
from megagpt.preflight.meeting import Meeting

SLOWEST_MBIT = 200.0
"""Below this a link is slow whatever the others are."""
SLOW_SHARE = 0.3
"""Of the median link's speed."""
LARGEST_SKEW = 1.0
_BYTES = 8 << 20
_TRIALS = 3
"""The best one counts: a busy processor is no slow link."""
_CHUNK = 1 << 20
_SECONDS = 20.0
_MOST_PAIRS = 256


@dataclass(frozen=True)
class Link:
    """What one host has measured towards another one."""

    source: str
    target: str
    problem: str | None
    mbit: float
    skew: float
    """Target's clock minus the source's, in seconds."""


def measure_links(meeting: Meeting, leaders: dict[str, int], host: str) -> list[Link]:
    """Try all pairs of hosts, or each one and its next ones where they are many; only the leaders take part.

    Args:
        meeting: of all ranks.
        leaders: first rank of each host.
        host: of this rank.
    """
    names = list(leaders)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if len(pairs) > _MOST_PAIRS:
        pairs = [(names[i], names[(i + shift) % len(names)]) for shift in (1, 2) for i in range(len(names))]
    with socket.create_server(("", 0), backlog=64) as server:
        server.settimeout(_SECONDS)
        address = _own_address(meeting.launch.master_addr, meeting.launch.master_port)
        meeting.tell("address", [address, server.getsockname()[1]])
        links: list[Link] = []
        for number, (source, target) in enumerate(pairs):
            if host == target:
                _serve(server)
                meeting.tell(f"served/{number}", True)
            if host == source:
                where = meeting.hear("address", leaders[target])
                links.append(_measure(source, target, tuple(where)))
                meeting.tell(f"measured/{number}", True)
            # One pair at a time, or they would share a wire.
            meeting.hear(f"measured/{number}", leaders[source])
    return links


def judge_links(links: list[Link], num_hosts: int) -> list[Finding]:
    """Findings about reach, speed and clocks."""
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
        counted = f"{len(links)} links" if len(links) > 1 else "1 link"
        findings.append(ok("network", f"{counted} between {num_hosts} hosts, {median:,.0f} Mbit/s over TCP"))
    skewed = [link for link in fine if abs(link.skew) > LARGEST_SKEW]
    findings += [
        warning("clocks", f"{link.target} is {link.skew:+.1f} s off {link.source}", "synchronise clocks (chrony)")
        for link in skewed
    ]
    if fine and not skewed:
        findings.append(ok("clocks", f"within {max(abs(link.skew) for link in fine):.3f} s"))
    return findings


def _own_address(master: str, port: int) -> str:
    """The address of this host by which it reaches the master."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((master, port))  # sends nothing
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _serve(server: socket.socket) -> None:
    """Answer one measurement: the time, then as many bytes as are sent are taken."""
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_SECONDS)
            for _ in range(3):
                connection.recv(1)
                connection.sendall(struct.pack("!d", time.time()))
            for _ in range(_TRIALS):
                left = _BYTES
                while left > 0 and (got := len(connection.recv(_CHUNK))):
                    left -= got
                connection.sendall(b"!")


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
            block, seconds = bytes(_CHUNK), float("inf")
            for _ in range(_TRIALS):
                started = time.monotonic()
                for _ in range(_BYTES // _CHUNK):
                    connection.sendall(block)
                _receive(connection, 1)
                seconds = min(seconds, time.monotonic() - started)
    except OSError as error:
        text = f"{where[0]} port {where[1]}: {error.strerror or error}"
        return Link(source, target, text, 0.0, 0.0)
    return Link(source, target, None, _BYTES * 8 / seconds / 1e6, skew)


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise OSError("the other side has closed the connection")
        data += part
    return data
