"""What a job prints: lines of rank 0, free of the libraries' warnings and chatter unless asked for."""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

_CHATTY_LOGGERS = (
    "DeepSpeed",
    "megatron",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils",
    "torch._dynamo",
    "torch._inductor",
)


def quiet_libraries(verbose: bool) -> None:
    """Hide warnings and log lines of torch, DeepSpeed and Megatron-Core, but no errors; call before importing them.

    Args:
        verbose: show everything instead.
    """
    if verbose:
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def muted(verbose: bool) -> Iterator[None]:
    """Swallow what libraries `print` while the block runs; if it raises, what was swallowed goes to stderr."""
    if verbose:
        yield
        return
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink):
            yield
    except BaseException:
        sys.stderr.write(sink.getvalue())
        raise
    finally:
        # Importing a library may have (re)created its loggers with their default level.
        quiet_libraries(verbose)


class Console:
    """Prints on rank 0 only.

    Args:
        rank: global rank of this process.
        verbose: whether the libraries' own output is shown.
    """

    def __init__(self, rank: int, verbose: bool = False):
        self.is_writer = rank == 0
        self.verbose = verbose
        self.started = time.monotonic()

    def say(self, text: str = "") -> None:
        """Print a line to stdout at once."""
        if self.is_writer:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a line that the user should not miss to stderr."""
        if self.is_writer:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def muted(self) -> contextlib.AbstractContextManager[None]:
        """Swallow what libraries print while the block runs."""
        return muted(self.verbose)
