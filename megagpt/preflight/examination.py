"""The whole examination, in one process or in all ranks of a job."""

import functools
from collections import Counter
from collections.abc import Callable

from megagpt.errors import LaunchError
from megagpt.launchers import host_name
from megagpt.parallel.launch import Launch
from megagpt.plan import Plan
from megagpt.preflight.collectives import check_collectives
from megagpt.preflight.findings import Finding, failed, merged, ok, some
from megagpt.preflight.host import checks, versions
from megagpt.preflight.meeting import AbsentRanksError, Meeting
from megagpt.preflight.network import judge_links, measure_links
from megagpt.preflight.shared import check_shared
from megagpt.preflight.tournament import Tournament
from megagpt.preflight.worker import NoAnswerError, Worker

CHECK_SECONDS = 60.0
"""For each check of a host: a file system that is gone answers nothing."""
_HOST_SECONDS = 8 * CHECK_SECONDS
_LEADERS_SECONDS = 3600.0
"""For all that only the first ranks of hosts do."""


def examine(plan: Plan, launch: Launch, patience: float) -> list[Finding]:
    """Examine this host, or all hosts of the job; all ranks take part, and rank 0 gets the findings.

    On a host that does not find rank 0, or hears no more of it, the first rank gets that; all other ranks get none.

    Args:
        plan: of the run.
        launch: this process's place.
        patience: seconds that all ranks have to come.
    """
    if launch.world_size == 1:
        found, libraries = _examine_host(plan, None, True, lambda doing: None)
        return [*found, *_check_alike({"this host": libraries}, "")]
    try:
        meeting = Meeting(launch, patience)
        findings = _examine_together(plan, meeting)
        meeting.part()
    except LaunchError as error:
        speaks = launch.rank == 0 or (launch.local_rank == 0 and not isinstance(error, AbsentRanksError))
        return [failed("meeting", str(error), "nothing else could be tried")] if speaks else []
    return findings if launch.rank == 0 else []


def _examine_together(plan: Plan, meeting: Meeting) -> list[Finding]:
    host = host_name()
    hosts = list(meeting.gather("host", host, CHECK_SECONDS).values())
    if meeting.lost:
        return [_silent(meeting, [])]
    leaders = {name: hosts.index(name) for name in dict.fromkeys(hosts)}
    findings: list[Finding] = []
    if leaders[host] == meeting.launch.rank:
        findings = _examine_hosts(plan, meeting, leaders, hosts)
        is_bad = bool(meeting.lost) or any(f.check == "network" and f.status == "failed" for f in findings)
        if meeting.launch.rank == 0:
            meeting.tell("collectives", not is_bad)
    meeting.note("waiting for the first ranks of hosts")
    if meeting.hear("collectives", _LEADERS_SECONDS):
        findings += check_collectives(meeting, hosts)
    else:
        advice = "see why a rank does not answer" if meeting.lost else "mend the network first"
        findings.append(failed("collectives", "not tried", advice))
    return [_silent(meeting, hosts), *findings] if meeting.lost else findings


def _examine_hosts(plan: Plan, meeting: Meeting, leaders: dict[str, int], hosts: list[str]) -> list[Finding]:
    """What the first rank of each host sees, alone and together with those of the others; all of them get it."""
    host = hosts[meeting.launch.rank]
    mine, libraries = _examine_host(plan, hosts.count(host), meeting.launch.rank == 0, meeting.note)
    told = [[finding.model_dump() for finding in mine], libraries]
    said = meeting.gather("findings", told, _HOST_SECONDS, leaders.values())
    there = {name: rank for name, rank in leaders.items() if rank in said}
    findings = merged({name: [Finding.model_validate(f) for f in said[rank][0]] for name, rank in there.items()})
    findings += _check_alike({name: said[rank][1] for name, rank in there.items()}, "alike everywhere: ")
    if len(there) == 1:
        return [*findings, *judge_links([], 1, "")]
    findings += check_shared(plan, meeting, there, host)
    tournament = Tournament(list(there))
    links = measure_links(meeting, there, host, tournament)
    return findings + judge_links(links, len(there), tournament.extent)


def _examine_host(
    plan: Plan, ranks_on_host: int | None, is_first: bool, note: Callable[[str], None]
) -> tuple[list[Finding], dict[str, str]]:
    """Findings about this host, and its versions; a check that hangs is one, too."""
    to_do = checks(plan, ranks_on_host, is_first)
    findings = []
    with Worker(functools.partial(_answer, to_do)) as worker:
        for name in to_do:
            note(name)
            try:
                findings.append(Finding.model_validate(worker.ask(CHECK_SECONDS, name)))
            except NoAnswerError as error:
                findings.append(failed(name, f"this check {error}", "see whether its file systems and GPUs answer"))
        try:
            libraries = worker.ask(CHECK_SECONDS, "versions")
        except NoAnswerError:
            libraries = {}
    return findings, libraries


def _answer(to_do: dict[str, Callable[[], Finding]], name: str) -> dict[str, str]:
    return versions() if name == "versions" else to_do[name]().model_dump()


def _silent(meeting: Meeting, hosts: list[str]) -> Finding:
    """The ranks that have not come back from something."""
    ranks = [
        f"rank {rank}{f' on {hosts[rank]}' if hosts else ''} has not come back from {doing}"
        for rank, doing in meeting.lost.items()
    ]
    return failed("meeting", some(ranks, "; "), "look for what holds these processes; not all else could be tried")


def _check_alike(by_host: dict[str, dict[str, str]], well: str) -> list[Finding]:
    """Versions that differ, by host; the most frequent one is taken for the intended one."""
    by_host = {host: found for host, found in by_host.items() if found}
    if not by_host:
        return [failed("versions", "not found out", "see whether GPUs answer")]
    findings = []
    for name in dict.fromkeys(name for found in by_host.values() for name in found):
        values = {host: found.get(name, "missing") for host, found in by_host.items()}
        if len(set(values.values())) > 1:
            usual = Counter(values.values()).most_common(1)[0][0]
            odd = some([f"{host} has {value}" for host, value in values.items() if value != usual])
            what = "the files of megagpt" if name == "source" else name
            findings.append(
                failed("versions", f"{what}: {odd}, others {usual}", "use one environment and one copy on all nodes")
            )
    return findings or [ok("versions", well + _words(next(iter(by_host.values()))))]


def _words(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if name != "source")
