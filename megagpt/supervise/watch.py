"""Watch a run: its ranks know of each other's end, and what ends it is said once, first and in words."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt.errors import TRY_AGAIN, ConfigError, DataError, MegagptError, RankError, UnreliableError
from megagpt.launchers import host_name
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan
from megagpt.plan.fitting import SEARCH_SECONDS
from megagpt.supervise.beats import FOLDER, Beat, BeatFolder
from megagpt.supervise.memory import Memory, advice, exhausted_memory, shortage
from megagpt.supervise.other_start import wait_for_its_end
from megagpt.supervise.pulse import Pulse
from megagpt.supervise.watchdog import Limits, Place, Watchdog

_OTHERS_VERDICT_SECONDS = 5.0
_LOST_PEER = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process has exited|ncclRemoteError"
    "|Timed out waiting .* for (recv|send) operation|Socket Timeout"
)
_SEARCH = "out-of-memory"


@contextlib.contextmanager
def watch(plan: Plan, ranks: Ranks) -> Iterator[Pulse]:
    """Watch all ranks while the block runs; collective. The block notes in the pulse what it does.

    Without a folder of the run (logging.directory, or a local checkpoint.directory) the ranks know nothing of each
    other, and only errors are worded.

    Raises:
        ConfigError: another run goes on in the same folder.
        RankError: this rank has met an error of its own, has run out of memory, or has lost another one.
    """
    folder = _folder(plan, ranks)
    watchdog = None if folder is None else Watchdog(folder, place_of(ranks), _limits(plan), _say)
    with watchdog or contextlib.nullcontext():
        try:
            if watchdog is not None:
                watchdog.meet(ranks.gather_objects(watchdog.first_beat))
            yield Pulse() if watchdog is None else watchdog.pulse
        except Exception as error:
            worded = _worded(error, plan, ranks, watchdog)
            if worded is error:
                raise
            raise worded from error
    if folder is not None:
        ranks.barrier()
        if ranks.rank == 0:
            folder.remove()


def place_of(ranks: Ranks) -> Place:
    """This rank's coordinates."""
    return Place(
        rank=ranks.rank,
        world_size=ranks.world_size,
        stage=ranks.pipeline_rank,
        data=ranks.data_rank,
        context=ranks.context_rank,
        tensor=ranks.tensor_rank,
    )


def _folder(plan: Plan, ranks: Ranks) -> BeatFolder | None:
    """A folder for this start; rank 0 names and makes it."""
    parent = plan.run.shared_folder
    if parent is None or ranks.world_size == 1:
        return None
    beats, patience = Path(parent) / FOLDER, 2 * plan.run.supervision.silent_seconds

    def describe(beat: Beat) -> str:
        return (
            f"{parent} is the folder of another run that goes on: its rank {beat.rank} on {beat.host} (process "
            f"{beat.pid}) is at step {beat.step:,}"
        )

    def tell(beat: Beat) -> None:
        print(f"{describe(beat)}; waiting {patience:.0f} s for its end", flush=True)

    other = ranks.broadcast_object(wait_for_its_end(beats, patience, tell) if ranks.rank == 0 else None)
    if other is not None:
        raise ConfigError(
            f"{describe(other)}; end that one, or give this one another checkpoint.directory and logging.directory",
            exit_code=TRY_AGAIN,
        )
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
    folder = BeatFolder(beats / ranks.broadcast_object(name))
    if ranks.rank == 0:
        folder.create()
    ranks.barrier()
    return folder


def _limits(plan: Plan) -> Limits:
    supervision = plan.run.supervision
    return Limits(stuck=supervision.hang_seconds, silent=supervision.silent_seconds)


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _worded(error: Exception, plan: Plan, ranks: Ranks, watchdog: Watchdog | None) -> Exception:
    """The error to raise in place of one that came out of the run."""
    name = f"rank {ranks.rank} on {host_name()}"
    text = str(error)
    if isinstance(error, DataError):
        _failed(watchdog, f"{name}: {error}", error.exit_code)
        return RankError(f"{name}: {error}", error.exit_code)
    if isinstance(error, UnreliableError) and watchdog is not None:
        watchdog.failed(str(error), error.exit_code, error.suspects)
    if isinstance(error, MegagptError):  # raised by all ranks together
        return error
    if (memory := exhausted_memory(error)) is not None:
        return _out_of_memory(memory, f"{name}: {shortage(memory, plan, ranks, text)}", plan, ranks, watchdog)
    if _LOST_PEER.search(text):
        return _lost_peer(name, watchdog)
    _failed(watchdog, f"{name}: {type(error).__name__}: {text.strip()}", TRY_AGAIN)
    return error


def _out_of_memory(memory: Memory, text: str, plan: Plan, ranks: Ranks, watchdog: Watchdog | None) -> RankError:
    """Of the ranks that run out together, the first one looks for what would fit; the others wait for it."""
    if watchdog is None or watchdog.folder.claim(_SEARCH):
        text = f"{text}\n{advice(memory, plan, ranks)}"
        _failed(watchdog, text, RankError.exit_code)
    else:
        watchdog.verdict_within(SEARCH_SECONDS + _OTHERS_VERDICT_SECONDS)
    return RankError(text)


def _failed(watchdog: Watchdog | None, text: str, exit_code: int) -> None:
    if watchdog is not None:
        watchdog.failed(text, exit_code)


def _lost_peer(name: str, watchdog: Watchdog | None) -> RankError:
    if watchdog is not None and (verdict := watchdog.verdict_within(_OTHERS_VERDICT_SECONDS)) is not None:
        return RankError("", verdict.exit_code)  # said by the rank that knows
    return RankError(
        f"{name}: another rank has ended or was killed; look for its message, or for the kernel's if it ran out of "
        "memory",
        TRY_AGAIN,
    )
