"""The same function for many arguments, in processes side by side."""

import multiprocessing
import queue
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from megagpt.errors import ConversionError, MegagptError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
POLL_SECONDS = 1.0


def run_forked(function: Callable[[Argument], Result], arguments: Sequence[Argument], workers: int) -> list[Result]:
    """Results in the order of the arguments; in this process if one worker is enough.

    Workers are forked, so that `function` may be anything; it must not use threads of torch in this process before.

    Raises:
        ConversionError: `workers` is not positive, or a worker was killed.
        MegagptError: what the function raised first.
    """
    if workers < 1:
        raise ConversionError(f"workers={workers} must be at least 1")
    workers = min(workers, len(arguments))
    if workers == 1:
        return [function(argument) for argument in arguments]
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for index in range(first, len(arguments), workers):
            try:
                results.put((index, function(arguments[index]), None))
            except Exception as error:
                known = (
                    error if isinstance(error, MegagptError) else ConversionError(f"{type(error).__name__}: {error}")
                )
                results.put((index, None, known))
                return

    processes = [context.Process(target=work, args=(worker,), daemon=True) for worker in range(workers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads; none of them is used
        for process in processes:
            process.start()
    try:
        found: dict[int, Result] = {}
        while len(found) < len(arguments):
            try:
                index, result, error = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in processes):
                    raise ConversionError("a worker was killed, perhaps for want of memory; use fewer") from None
                continue
            if error is not None:
                raise error
            found[index] = result
        return [found[index] for index in range(len(arguments))]
    finally:
        for process in processes:
            process.terminate()
            process.join()
