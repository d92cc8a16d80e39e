"""Keep Slurm's jobs off nodes that have failed, as long as enough others could take their place (no torch).

Slurm changes the nodes of a job only while it is pending, which one that is queued again is from that moment on. A job
that is left with too few nodes is not told so: Slurm holds it for ever. So they are counted before.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagpt.supervise.slurm import NoAnswerError, ask

_FORMAT = "%N|%t|%c|%m|%G|%b"
_UP = re.compile(r"(idle|mix|alloc|comp|plnd)[-+~#!%@^]?")
"""Also what Slurm has planned for a job (-), where one job runs and another one ends (+), what is switched off to save
power (~), is being started (#) or soon comes back from that (!, %) or from a new boot (@, ^). Not what does not respond
(*) or is kept for maintenance ($)."""
_PAUSES = (1.0, 2.0, 4.0)
"""Between tries; Slurm kills a batch file half a minute after its job has been queued again."""


@dataclass(frozen=True)
class Node:
    """One of Slurm's."""

    name: str
    state: str
    cpus: int
    memory: int
    gres: str
    features: frozenset[str]

    def serves_like(self, other: "Node") -> bool:
        """Whether it has what another one has."""
        return self.cpus >= other.cpus and self.memory >= other.memory and self.gres == other.gres

    def fulfils(self, constraint: str) -> bool:
        """Whether it has the features of a constraint without brackets: `a&b|c`."""
        return not constraint or any(self.features.issuperset(part.split("&")) for part in constraint.split("|"))


def keep_off(job: str, bad: Sequence[str], num_nodes: int) -> str:
    """Have a pending job start without some nodes.

    Args:
        job: Slurm's number of it.
        bad: nodes.
        num_nodes: that it needs. Of a job that has just been queued again Slurm tells those that it has not left yet.

    Returns:
        Why it may still get them; empty: it does not.
    """
    try:
        return _keep_off(job, bad, num_nodes)
    except NoAnswerError as error:
        return str(error)


def _keep_off(job: str, bad: Sequence[str], num_nodes: int) -> str:
    fields = _fields("job", job)
    obstacles = [_obstacle(fields, partition, bad, num_nodes) for partition in fields.get("Partition", "").split(",")]
    if all(obstacles):
        return obstacles[0]
    excluded = dict.fromkeys([*_hosts(fields.get("ExcNodeList", "")), *bad])
    told = ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}", pauses=_PAUSES)
    return "scontrol refuses to leave them out, as printed above" if told is None else ""


def _obstacle(fields: Mapping[str, str], partition: str, bad: Sequence[str], needed: int) -> str:
    """Why a job cannot do without some nodes of a partition; empty if it can."""
    nodes, constraint, reservation = _nodes(partition), fields.get("Features", ""), fields.get("Reservation", "")
    if missing := [name for name in bad if name not in nodes]:
        return f"sinfo shows no {missing[0]} in partition {partition}"
    if re.search(r"[][()*!]", constraint):
        return f"which nodes have --constraint={constraint} is not worked out here"
    if named := sorted({*bad} & {*_hosts(fields.get("ReqNodeList", ""))}):
        return f"--nodelist asks for {named[0]}"
    out_of_reach = {*bad, *_hosts(fields.get("ExcNodeList", ""))}
    if reservation:
        out_of_reach |= nodes.keys() - _hosts(_fields("reservation", reservation).get("Nodes", ""))
    others = [
        node
        for node in nodes.values()
        if node.name not in out_of_reach
        and (_UP.fullmatch(node.state) or (node.state == "resv" and reservation))
        and node.serves_like(nodes[bad[0]])
        and node.fulfils(constraint)
    ]
    is_enough = len(others) >= needed
    return "" if is_enough else f"of nodes that serve as well {len(others)} are up, and the job needs {needed}"


def followers(job: str, ended_well: bool) -> list[str]:
    """Jobs of the same command that start once this one has ended, and those after them: the rest of its chain.

    Args:
        job: Slurm's number of one that runs.
        ended_well: how it ends, on which it depends who follows.

    Raises:
        NoAnswerError: Slurm does not answer.
    """
    told = ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%E|%o") or ""
    rows = [line.strip().split("|", 2) for line in told.splitlines() if line.count("|") >= 2]
    own = [command for number, _, command in rows if number == job]
    how, found = "any|ok" if ended_well else "any|notok", [job]
    for last in found:  # which grows
        after = re.compile(rf"\bafter(?:{how}):{last}\b")
        found += [number for number, waits_for, command in rows if after.search(waits_for) and command in own]
    return found[1:]


def _nodes(partition: str) -> dict[str, Node]:
    told = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", f"--format={_FORMAT}", pauses=_PAUSES) or ""
    found = {}
    for line in told.splitlines():
        name, state, cpus, memory, gres, features = line.strip().split("|")
        found[name] = Node(name, state, int(cpus), int(memory), gres, frozenset(features.split(",")))
    return found


def _fields(kind: str, name: str) -> dict[str, str]:
    """What Slurm knows of a job or a reservation; without what is not set."""
    told = ask("scontrol", "--oneliner", "show", kind, name, pauses=_PAUSES) or ""
    parts = (part.partition("=") for part in told.split())
    return {key: value for key, _, value in parts if value != "(null)"}


def _hosts(text: str) -> list[str]:
    return (ask("scontrol", "show", "hostnames", text, pauses=_PAUSES) or "").split() if text else []
