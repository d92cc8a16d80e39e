"""Ask Slurm, more than once: its controller does not answer while it is restarted or busy (no torch)."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence

PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 30.0, 30.0, 30.0)
"""Seconds between tries: some minutes."""
_TRY_SECONDS = 60.0
_REFUSED = re.compile(
    r"invalid (array|job id|node|partition|reservation|user)|denied|disabled|not supported"
    r"|configuration is not available|only for batch|pending execution|already complet",
    re.IGNORECASE,
)
"""What will not be different a minute later; all other failures are tried again."""


class NoAnswerError(Exception):
    """One of Slurm's commands has failed for minutes, and not because something is refused."""


def ask(*command: str, pauses: Sequence[float] | None = None) -> str | None:
    """What one of Slurm's commands prints; None if it is refused or not there. What it says of that goes to stderr.

    Args:
        command: its words.
        pauses: seconds between tries, `PAUSES` if not given.

    Raises:
        NoAnswerError: no try has succeeded.
    """
    pauses = PAUSES if pauses is None else pauses
    deadline = time.monotonic() + 2 * sum(pauses) + _TRY_SECONDS
    for pause in (*pauses, None):
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_SECONDS, check=False)
            words = result.stderr.strip()
        except subprocess.TimeoutExpired:
            result, words = None, f"{command[0]}: no answer within {_TRY_SECONDS:.0f} s"
        except OSError as error:
            print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
            return None
        if words:
            print(words, file=sys.stderr, flush=True)
        if result is not None and result.returncode == 0:
            return result.stdout
        if _REFUSED.search(words):
            return None
        if pause is None or time.monotonic() > deadline:
            break
        time.sleep(pause)
    raise NoAnswerError(f"Slurm does not answer `{' '.join(command[:2])} ...`, as printed above")
