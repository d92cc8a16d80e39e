"""Errors that a user can act on, and how commands report them.

Every message gives the key or file, its value, the rule that it breaks and the fix. Commands print it without a
traceback and exit with status 2, or 75 if it may pass by itself; `assert` is left for our own bugs.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

TRY_AGAIN = 75
"""EX_TEMPFAIL, the exit status of what may well succeed when it is started again."""
_PASSING = {
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
"""What file systems on a network say while a server or the way to it is away."""


class MegagptError(Exception):
    """Base of all errors that a user can mend.

    Args:
        text: what to say.
        exit_code: of the process, if it is not the one of the class.
    """

    exit_code = 2

    def __init__(self, text: str, exit_code: int | None = None):
        super().__init__(text)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(MegagptError):
    """A run config, a DeepSpeed config or their combination breaks one or more rules.

    Args:
        problems: one sentence per broken rule, each with key, value, rule and fix.
        advice: what would mend all of them together; commands print it last.
        exit_code: of the process, if it is not 2.
    """

    def __init__(self, problems: str | list[str], advice: str | None = None, exit_code: int | None = None):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.advice = advice
        super().__init__("\n".join(self.problems), exit_code)


class DataError(MegagptError):
    """A text, tokenizer or dataset file is missing, damaged or does not fit its companions."""


class CheckpointError(MegagptError):
    """A checkpoint is missing, damaged or belongs to another model."""


class OtherVersionError(CheckpointError):
    """A checkpoint is whole, but another version of megagpt has written it."""


class StorageError(MegagptError):
    """A store refuses, is not there or does not answer; nothing is said about what it holds."""


class TrainingError(MegagptError):
    """A run cannot go on: its loss is no number any more, or one of its ranks is lost."""


class RankError(TrainingError):
    """What one rank alone has met; the others merely see it leave.

    Args:
        text: what to say; nothing if another rank has said it.
        exit_code: of this process, if it is not 2.
    """


class UnreliableError(TrainingError):
    """A device or a transfer has erred silently; started again elsewhere, the run may well go on.

    Args:
        text: what was found.
        suspects: hosts by the ranks that it was found on, if that is known.
    """

    exit_code = TRY_AGAIN

    def __init__(self, text: str, suspects: dict[int, str] | None = None):
        super().__init__(text)
        self.suspects = suspects or {}


class ConversionError(MegagptError):
    """A model has no exact counterpart in the target format, or its logits differ after conversion."""


class LaunchError(MegagptError):
    """The ranks of a job cannot be found out or contradict each other."""


class MissingRanksError(LaunchError):
    """Some ranks have not come to where the ranks of a job meet, or have come without a GPU that the others have.

    Args:
        text: what to say.
        present_hosts: where the others are.
    """

    def __init__(self, text: str, present_hosts: Sequence[str]):
        super().__init__(text, TRY_AGAIN)
        self.present_hosts = present_hosts


def in_one_line(error: BaseException) -> str:
    """Kind of an error of a library, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def exit_code_of(error: Exception) -> int:
    """Exit status of a command that an error of a file system or a store ends: 75 if it may pass by itself, else 2."""
    if isinstance(error, MegagptError):
        return error.exit_code
    return TRY_AGAIN if isinstance(error, OSError) and error.errno in _PASSING else MegagptError.exit_code


def run_command(main: Callable[[], int | None], leave_at_once: bool = False) -> NoReturn:
    """Run a command's main function and end the process: 2 (or 75) after a user's error, 130 after Ctrl-C, else what it
    returns.

    Args:
        main: the command.
        leave_at_once: after an error end the process without tearing down what it has built: a rank that has failed
            must not wait for others.
    """
    try:
        code = main() or 0
    except MegagptError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if isinstance(error, ConfigError) and error.advice:
            print(f"advice: {error.advice}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception:
        if not leave_at_once:
            raise
        traceback.print_exc()
        code = 1
    if code and leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
