"""Sums over pairs of ranks and over all of them, by the backend that the run would take: right, and how fast.

Each host's rank meets the rank of the same place on the other host, as rings over GPUs do, so that each GPU and network
card is looked at. A collective that hangs takes its process with it, so each rank has another one for them.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import LaunchError
from megagpt.parallel.interface import choose_interface
from megagpt.parallel.launch import Launch
from megagpt.parallel.ranks import gpu_index
from megagpt.preflight.findings import Finding, failed, ok, some, warning
from megagpt.preflight.meeting import Meeting
from megagpt.preflight.tournament import Tournament
from megagpt.preflight.worker import NoAnswerError, Worker

READY_SECONDS = 120.0
"""In which a GPU must start."""
PAIR_SECONDS = 45.0
ALL_SECONDS = 60.0
SLOW_SHARE = 0.3
"""Of the median pair's speed."""
_FEWEST_TO_COMPARE = 3
_NUMBERS = {"gloo": 1 << 18, "nccl": 1 << 24}
"""fp32 numbers of a sum that is timed."""
_TRIALS = 5
"""The best one counts: a busy processor is no slow link."""
_LONG = 0.1
"""Seconds after which a sum is not repeated."""
_ADVICE = "name the interface between the nodes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and see NCCL_DEBUG=INFO"
_CHECK = "collectives"


@dataclass(frozen=True)
class Sum:
    """What a rank of each of two hosts have measured together."""

    hosts: tuple[str, str]
    ranks: tuple[int, int]
    problem: str
    seconds: float


def check_collectives(meeting: Meeting, hosts: Sequence[str]) -> list[Finding]:
    """Findings of all ranks together, which all take part and all get them.

    Args:
        meeting: of all ranks.
        hosts: of each rank.
    """
    with Worker(_Sums(meeting.launch, meeting.prefix).answer) as worker:
        ready = meeting.gather("ready", _prepared(worker), READY_SECONDS + 10)
        problems = [f"rank {rank} on {hosts[rank]}: {text}" for rank, (_, text) in ready.items() if text]
        backends = {rank: backend for rank, (backend, text) in ready.items() if not text}
        bare = [f"{hosts[rank]} (rank {rank})" for rank, backend in backends.items() if backend == "gloo"]
        if bare and len(bare) < len(backends):
            problems.append(f"no GPU on {some(bare)}, unlike the others")
        if problems or meeting.lost:
            return [failed(_CHECK, some(problems, "; ") or "not tried: a rank does not answer", _ADVICE)]
        tournament = Tournament(list(dict.fromkeys(hosts)))
        findings = judge_sums(_pair_sums(meeting, worker, hosts, tournament), backends[0], tournament.extent)
        if meeting.lost or any(finding.status == "failed" for finding in findings):
            return findings
        return [*findings, _sum_over_all(meeting, worker, hosts, backends[0])]


def judge_sums(sums: list[Sum], backend: str, extent: str) -> list[Finding]:
    """Findings about pairs of hosts.

    Args:
        sums: of all pairs.
        backend: that was used.
        extent: how many pairs of hosts they are, of how many.
    """
    if not sums:
        return []
    broken: dict[tuple[str, str], list[str]] = {}
    for one in sums:
        if one.problem:
            text = f"a sum over ranks {one.ranks[0]} and {one.ranks[1]} {one.problem}"
            broken.setdefault(one.hosts, []).append(text)
    if broken:
        pairs = [f"{' and '.join(pair)}: {some(texts, '; ', most=1)}" for pair, texts in broken.items()]
        return [failed(_CHECK, f"{backend}, {extent}: {some(pairs, '; ')}", _ADVICE)]
    speeds = [_NUMBERS[backend] * 4 * 8 / one.seconds / 1e9 for one in sums]
    median = statistics.median(speeds)
    slow = [
        f"{' and '.join(one.hosts)} sum {speed:.2f} Gbit/s over ranks {one.ranks[0]} and {one.ranks[1]}"
        for speed, one in sorted(zip(speeds, sums, strict=True), key=lambda entry: entry[0])
        if len(sums) >= _FEWEST_TO_COMPARE and speed < SLOW_SHARE * median
    ]
    if slow:
        advice = "look at the cards, cables and ports of these ranks; a job is as fast as its slowest link"
        return [warning(_CHECK, f"{backend}: {some(slow, '; ')} (median {median:.2f})", advice)]
    return [ok(_CHECK, f"{backend}: {extent} sum rightly, {median:.2f} Gbit/s between two ranks")]


def _pair_sums(meeting: Meeting, worker: Worker, hosts: Sequence[str], tournament: Tournament) -> list[Sum]:
    """What all pairs of ranks measure, those of a round all at once."""
    places = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in tournament.hosts}
    sums = []
    for number, pairs in enumerate(tournament.rounds()):
        groups = {ranks: (a, b) for a, b in pairs for ranks in zip(places[a], places[b], strict=False)}
        mine = next((ranks for ranks in groups if meeting.launch.rank in ranks), None)
        meeting.note(f"a sum over ranks {mine}" if mine else "a pause")
        outcome = _tried(worker, f"sums/{number}/{min(mine)}", mine, PAIR_SECONDS) if mine else ("", 0.0)
        said = meeting.gather("pairs", outcome, PAIR_SECONDS + READY_SECONDS + 10)
        if meeting.lost:
            break
        found = []
        for ranks, pair in groups.items():
            problems = [(said[rank][0], rank) for rank in ranks if said[rank][0]]
            found.append(Sum(pair, ranks, _most_telling(problems), max(said[rank][1] for rank in ranks)))
        for pair in {one.hosts for one in found if one.problem}:
            tournament.failed(pair)
        sums += found
    return sums


def _sum_over_all(meeting: Meeting, worker: Worker, hosts: Sequence[str], backend: str) -> Finding:
    meeting.note("a sum over all ranks")
    outcome = _tried(worker, "sums/all", tuple(range(len(hosts))), ALL_SECONDS)
    said = meeting.gather("all", outcome, ALL_SECONDS + READY_SECONDS + 10)
    wrong = [f"on rank {rank} on {hosts[rank]} it {text}" for rank, (text, _) in said.items() if text]
    if wrong or meeting.lost:
        return failed(_CHECK, f"{backend}: a sum over all {len(hosts)} ranks: {some(wrong, '; ')}", _ADVICE)
    seconds = max(seconds for _, seconds in said.values())
    size = _NUMBERS[backend] * 4 >> 20
    return ok(_CHECK, f"{backend}: sums over {len(hosts)} ranks are right, {size} MiB in {seconds * 1e3:.1f} ms")


def _prepared(worker: Worker) -> tuple[str, str]:
    try:
        backend, problem = worker.ask(READY_SECONDS, "prepare")
    except NoAnswerError as error:
        return "", f"the start of its device {error}"
    return backend, problem


def _tried(worker: Worker, name: str, members: tuple[int, ...], seconds: float) -> tuple[str, float]:
    """What is wrong with a sum (nothing: an empty text), and how long it takes."""
    try:
        problem, took = worker.ask(seconds, "sum", name, members)
    except NoAnswerError as error:
        _prepared(worker)  # or the partner of the next round would wait for it
        return str(error), 0.0
    return problem, took


def _most_telling(problems: list[tuple[str, int]]) -> str:
    """Of what ranks say of a sum: that another one does not answer, or has gone, follows from what that one says."""
    for start in ("has not ended", "fails"):
        problems = [said for said in problems if not said[0].startswith(start)] or problems
    if not problems:
        return ""
    text, rank = problems[0]
    return text if len(problems) > 1 else f"{text} (rank {rank})"


class _Sums:
    """In the worker: takes part in sums.

    Args:
        launch: this rank's place.
        prefix: of names in the store at which the ranks meet.
    """

    def __init__(self, launch: Launch, prefix: str):
        self._launch, self._prefix = launch, prefix
        self._store: Any = None
        self._backend, self._device = "gloo", torch.device("cpu")

    def answer(self, what: str, *arguments: Any) -> tuple[Any, Any]:
        """A question of the parent's."""
        return self._prepare() if what == "prepare" else self._sum(*arguments)

    def _prepare(self) -> tuple[str, str]:
        """The backend, and what is wrong (nothing: an empty text)."""
        launch = self._launch
        try:
            choose_interface(launch.master_addr)
            if torch.cuda.is_available():
                index = gpu_index(launch.local_rank, torch.cuda.device_count())
                self._backend, self._device = "nccl", torch.device("cuda", index)
                torch.cuda.set_device(index)
            torch.zeros(1, device=self._device)
            store = dist.TCPStore(launch.master_addr, launch.master_port, None, is_master=False)
            self._store = dist.PrefixStore(self._prefix, store)
        except (LaunchError, RuntimeError, dist.DistError) as error:
            return self._backend, str(error).strip().splitlines()[0]
        return self._backend, ""

    def _sum(self, name: str, members: tuple[int, ...]) -> tuple[str, float]:
        """What is wrong with a sum over these ranks (nothing: an empty text), and the seconds that it takes."""
        if self._store is None and (problem := self._prepare()[1]):
            return problem, 0.0
        try:
            dist.init_process_group(
                self._backend, store=dist.PrefixStore(name, self._store), rank=members.index(self._launch.rank),
                world_size=len(members), timeout=timedelta(seconds=10 * ALL_SECONDS),  # the parent's comes first
            )  # fmt: skip
            return self._best_of_some(members)
        except (RuntimeError, dist.DistError) as error:
            return f"fails: {str(error).strip().splitlines()[0]}", 0.0
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _best_of_some(self, members: tuple[int, ...]) -> tuple[str, float]:
        self._timed(1 << 10, members)  # connects
        best = float("inf")
        for _ in range(_TRIALS):
            is_right, seconds = self._timed(_NUMBERS[self._backend], members)
            best = min(best, seconds)
            slowest, has_wrong = self._largest(seconds, not is_right)
            if has_wrong or slowest > _LONG:
                break
        return "" if is_right else "comes out wrong", best

    def _timed(self, numbers: int, members: tuple[int, ...]) -> tuple[bool, float]:
        """Whether a sum is right to the last number, and the seconds it has taken."""
        base = (torch.arange(numbers, device=self._device) % 251).float()  # sums are exact in fp32
        values = base + self._launch.rank % 251
        self._settle()
        started = time.monotonic()
        dist.all_reduce(values)
        self._settle()
        seconds = time.monotonic() - started
        return torch.equal(values, base * len(members) + sum(rank % 251 for rank in members)), seconds

    def _largest(self, *values: float) -> list[float]:
        agreed = torch.tensor(values, dtype=torch.float32, device=self._device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return list(agreed.tolist())

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
