"""A thread beside each rank: it beats, looks after the others, and ends the job with the right words (no torch).

A rank waiting inside a collective cannot look around; this thread can, as collectives leave Python free. What the ranks
know of each other goes through files in a folder that all hosts share, so that a broken network between the ranks does
not silence them. Each rank's thread looks once a second whether a verdict has been passed and whether a rank of its own
host is gone; the first healthy rank also reads the beats of all others.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megagpt.errors import TRY_AGAIN, MegagptError, RankError
from megagpt.launchers import host_name
from megagpt.plan.config import PATIENCE_WITH_SLOW_PHASES
from megagpt.supervise.beats import (
    SECONDS_BETWEEN_BEATS,
    Beat,
    BeatFolder,
    Verdict,
    pid_space,
    process_start,
    process_state,
)
from megagpt.supervise.pulse import SLOW_PHASES, Phase, Pulse
from megagpt.supervise.verdict import Condition, Seen, describe_lost, explain

LOOK_SECONDS = 1.0
_WAITING_FILES = ("queue.py", "threading.py")
"""A wait for a thread is told as the wait of who has called them."""


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the layout."""

    rank: int
    world_size: int
    stage: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Limits:
    """How long something may last, in seconds."""

    stuck: float
    """Without a new phase on any rank."""
    silent: float = 30.0
    """Without a beat of a rank, and without a new phase on those that beat: its process is frozen, or its host lost."""
    grace: float = 3.0
    """Left to the main thread to end by itself once the job is over; and to all ranks to write their stacks."""


class Watchdog:
    """Watches from `with` to its end.

    Args:
        folder: shared by all ranks and new; exists.
        place: of this rank.
        limits: a `stuck` of 0 waits for ever, but still notices ranks that are gone.
        say: prints a paragraph to the user.
        leave: ends the process with an exit code.
    """

    def __init__(
        self,
        folder: BeatFolder,
        place: Place,
        limits: Limits,
        say: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ):
        self.folder, self.place, self.limits = folder, place, limits
        self.pulse = Pulse()
        self._say, self._leave = say, leave
        self._host, self._pid = host_name(), os.getpid()
        self._pid_started, self._pid_space = process_start(self._pid), pid_space()
        self._number, self._last_beat, self._where, self._has_stack = 0, 0.0, "", False
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> its last number, and when it was new
        self._neighbours: list[Beat] = []  # as they were when they were met
        self._stopped: dict[int, float] = {}  # ranks of this host found stopped, and since when
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beat_seconds = min(SECONDS_BETWEEN_BEATS, max(limits.silent / 6, 0.1))

    def __enter__(self) -> "Watchdog":
        self._locked_stack = self.folder.stack_path(self.place.rank).with_suffix(".locked").open("wb", buffering=0)
        self.first_beat = self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What all ranks raise together ends them one after the other: none of them is lost.
        is_agreed = error is None or (isinstance(error, MegagptError) and not isinstance(error, RankError))
        if is_agreed:
            self.pulse.enter(Phase.LEFT)
        self._over.set()
        self._thread.join(timeout=2 * LOOK_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        self._locked_stack.close()
        if error is not None and not is_agreed and not self._has_stack:
            self._keep_traceback(error)
        if is_agreed:
            try:
                self._beat()
            except OSError:  # on a disk that is full, which may be why
                self.folder.withdraw(self.place.rank)

    def meet(self, beats: Sequence[Beat]) -> None:
        """Look after the ranks of this host from now on.

        Args:
            beats: the first ones of all ranks, which all watch by now.
        """
        self._neighbours = [beat for beat in beats if beat.host == self._host and beat.rank != self.place.rank]

    def failed(self, text: str, exit_code: int, unreliable: dict[int, str] | None = None) -> Verdict:
        """Pass the verdict that this rank has met an error; returns the one that holds, which may be another rank's.

        Args:
            text: what to say.
            exit_code: of the process.
            unreliable: if it is none of this rank's own: hosts by the ranks that have erred silently, as far as known.
        """
        guilty = {self.place.rank: self._host} if unreliable is None else unreliable
        verdict = Verdict(
            kind="failed" if unreliable is None else "unreliable",
            by=self.place.rank,
            text=text,
            culprits=sorted(guilty),
            hosts=sorted(set(guilty.values())),
            exit_code=exit_code,
        )
        return self.folder.pass_verdict(verdict)

    def verdict_within(self, seconds: float) -> Verdict | None:
        """The verdict, once there is one; None if nobody passes one in time."""
        deadline = time.monotonic() + seconds
        while (verdict := self.folder.verdict()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return verdict

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - last > max(5 * LOOK_SECONDS, self.limits.silent / 2):
                self._heard.clear()  # this host slept: what it has not heard is not the others' fault
            last = now
            try:
                self._look()
            except OSError:  # the shared folder is away for a moment
                continue

    def _look(self) -> None:
        now = time.monotonic()
        # If Python itself hangs, with its lock held, the stack is still written, by a thread that needs no lock.
        faulthandler.dump_traceback_later(max(self.limits.silent, 20.0), file=self._locked_stack, exit=False)
        verdict = self.folder.verdict() or self._lost_neighbour()
        if verdict is None and self.folder.stacks_are_wanted and not self._has_stack:
            self._write_stack()
            self._beat()
        if now - self._last_beat >= self._beat_seconds:
            self._beat()
            if verdict is None and self._is_first():
                verdict = self._judge()
        if verdict is not None and not self._over.is_set():
            self._end(verdict)

    def _beat(self) -> Beat:
        moment = self.pulse.now
        self._number += 1
        self._last_beat = time.monotonic()
        still_for = self._last_beat - moment.since
        place = self.place
        beat = Beat(
            rank=place.rank,
            host=self._host,
            pid=self._pid,
            pid_started=self._pid_started,
            pid_space=self._pid_space,
            stage=place.stage,
            data=place.data,
            context=place.context,
            tensor=place.tensor,
            step=moment.step,
            microbatch=moment.microbatch,
            phase=moment.phase,
            count=moment.entered,
            number=self._number,
            still_for=still_for,
            is_stuck=self._is_stuck(moment.phase, still_for),
            where=self._where,
        )
        self.folder.write(beat)
        return beat

    def _is_stuck(self, phase: Phase, still_for: float) -> bool:
        patience = self.limits.stuck * (PATIENCE_WITH_SLOW_PHASES if phase in SLOW_PHASES else 1.0)
        return 0 < patience <= still_for

    def _write_stack(self) -> None:
        frames = sys._current_frames()
        lines = [self._head]
        for number in sorted(frames, key=lambda number: number != self._main):
            lines.append("\nmain thread\n" if number == self._main else f"\nthread {number}\n")
            lines += traceback.format_stack(frames[number])
        self.folder.stack_path(self.place.rank).write_text("".join(lines))
        self._has_stack = True
        if self._main in frames:
            calls = traceback.extract_stack(frames[self._main])
            innermost = next(call for call in reversed(calls) if Path(call.filename).name not in _WAITING_FILES)
            self._where = f"{Path(innermost.filename).name}:{innermost.lineno} in {innermost.name}"

    def _keep_traceback(self, error: BaseException) -> None:
        """Of a rank that has left by itself, as another one was lost, before its stack was wanted."""
        with contextlib.suppress(OSError):
            if (verdict := self.folder.verdict()) is not None and verdict.kind == "lost":
                lines = [self._head, "\nmain thread, by the error that it met\n", *traceback.format_exception(error)]
                self.folder.stack_path(self.place.rank).write_text("".join(lines))

    @property
    def _head(self) -> str:
        return f"rank {self.place.rank} on {self._host}, process {self._pid}\n"

    # ---------------------------------------------------------------- judging

    def _lost_neighbour(self) -> Verdict | None:
        """A rank of this host whose process is gone or stopped: its host's ranks know first, and best."""
        now = time.monotonic()
        for beat in self._neighbours:
            state = process_state(beat.pid, beat.pid_started)
            stopped_since = self._stopped.setdefault(beat.rank, now) if state and "stopped" in state else None
            if stopped_since is None:
                self._stopped.pop(beat.rank, None)
            # Before the other hosts, which only know that it is silent.
            is_frozen = stopped_since is not None and now - stopped_since >= 0.7 * self.limits.silent
            if state is not None and not is_frozen:
                continue
            last = self.folder.read(beat.rank) or beat
            if self.folder.is_withdrawn(beat.rank):
                continue
            if last.phase != Phase.LEFT and self.folder.verdict() is None:
                condition: Condition = "gone" if state is None else "frozen"
                detail = _killed_for_memory() if state is None else f"its process {beat.pid} is {state}"
                return self._pass("lost", describe_lost(Seen(last, condition, detail)), [last])
        return None

    def _is_first(self) -> bool:
        """Whether no rank before this one is healthy enough to judge."""
        return all(self._condition(rank, self.folder.read(rank)) != "alive" for rank in range(self.place.rank))

    def _condition(self, rank: int, beat: Beat | None) -> Condition:
        now = time.monotonic()
        number = -1 if beat is None else beat.number
        known, since = self._heard.get(rank, (None, now))
        if known != number:
            self._heard[rank] = (number, now)
            return "alive"
        return "alive" if now - since < self.limits.silent or (beat and beat.phase == Phase.LEFT) else "frozen"

    def _judge(self) -> Verdict | None:
        seen = self._all_ranks()
        if seen is None:
            return None
        if silent := [rank for rank in seen if rank.condition != "alive"]:
            return self._judge_silent(silent, seen)
        if not all(rank.beat.is_stuck for rank in seen):
            return None
        self.folder.want_stacks()
        self._write_stack()
        self._beat()
        time.sleep(self.limits.grace)
        seen = self._all_ranks()
        if seen is None or not all(rank.beat.is_stuck or rank.condition != "alive" for rank in seen):
            return None  # it went on in the last moment
        text, culprits = explain(seen, str(self.folder.folder / "stack-*.txt"))
        return self._pass("stuck", text, [culprit.beat for culprit in culprits])

    def _judge_silent(self, silent: list[Seen], seen: list[Seen]) -> Verdict | None:
        """Ranks whose beats do not come any more are lost once those that are heard stand still as well: as long as
        they go on, so do the silent ones, and it is only that these cannot write."""
        heard = [rank for rank in seen if rank.condition == "alive" and rank.beat.phase != Phase.LEFT]
        if any(rank.beat.still_for < self.limits.silent for rank in heard):
            return None
        if any(self._is_left_to_neighbours(rank, heard) for rank in silent):
            return None
        sentences = [describe_lost(rank) for rank in silent[:4]]
        if len(silent) > 4:
            sentences.append(f"and so it is with {len(silent) - 4} more ranks")
        return self._pass("lost", "; ".join(sentences), [rank.beat for rank in silent])

    def _is_left_to_neighbours(self, silent: Seen, heard: list[Seen]) -> bool:
        """Whether a rank of another host is soon to be judged by others there, which see what its process is doing."""
        host = silent.beat.host
        has_neighbours = any(other.beat.host == host for other in heard)
        silent_for = time.monotonic() - self._heard[silent.beat.rank][1]
        return host != self._host and has_neighbours and silent_for < 2 * self.limits.silent

    def _all_ranks(self) -> list[Seen] | None:
        seen = []
        for rank in range(self.place.world_size):
            beat = self.folder.read(rank)
            condition = "alive" if rank == self.place.rank else self._condition(rank, beat)
            if beat is None:
                return None
            detail = ""
            if condition != "alive" and beat.host == self._host:
                state = process_state(beat.pid, beat.pid_started)
                condition = condition if state else "gone"
                detail = f"its process {beat.pid} is {state}" if state else _killed_for_memory()
            seen.append(Seen(beat, condition, detail))
        return seen

    def _pass(self, kind: str, text: str, culprits: list[Beat]) -> Verdict:
        verdict = Verdict(
            kind=kind,
            by=self.place.rank,
            text=text,
            culprits=[beat.rank for beat in culprits],
            hosts=sorted({beat.host for beat in culprits}),
            exit_code=TRY_AGAIN,
        )
        holds = self.folder.pass_verdict(verdict)
        if holds == verdict:
            self._say(text)
        return holds

    # ---------------------------------------------------------------- the end

    def _end(self, verdict: Verdict) -> None:
        """Let the main thread end by itself; if it cannot, end it, and kill the frozen ranks of this host.

        Where ranks are lost nobody has asked for stacks: waiting for them would only make the end later.
        """
        if verdict.kind == "lost" and not self._has_stack:
            with contextlib.suppress(OSError):
                self._write_stack()
        if verdict.kind != "stuck" and self._over.wait(self.limits.grace):
            return
        for beat in self._neighbours:
            if beat.rank in verdict.culprits and process_state(beat.pid, beat.pid_started) is not None:
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._leave(verdict.exit_code)


def _oom_kills() -> int:
    """Processes that this host's kernel has killed for lack of memory since it booted."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counters.get("oom_kill", "0"))
    except (OSError, ValueError):
        return 0


_OOM_KILLS_BEFORE = _oom_kills()


def _killed_for_memory() -> str:
    killed = _oom_kills() - _OOM_KILLS_BEFORE
    if killed <= 0:
        return ""
    return f"its host's kernel has killed {killed} process(es) for lack of memory since this run began"
