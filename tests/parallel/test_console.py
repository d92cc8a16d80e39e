"""Who speaks, and what is kept quiet."""

import logging
import warnings

import pytest

from megagpt.parallel.console import Console, muted, quiet_libraries


def test_only_rank_0_speaks(capsys):
    for rank in (0, 1):
        console = Console(rank)
        console.say(f"line of {rank}")
        console.warn(f"trouble of {rank}")
    said, warned = capsys.readouterr()
    assert said == "line of 0\n"
    assert warned == "warning: trouble of 0\n"


def test_what_libraries_print_is_swallowed(capsys):
    with Console(0).muted():
        print("chatter")
    print("ours")
    assert capsys.readouterr().out == "ours\n"


def test_what_libraries_printed_before_an_error_is_shown(capsys):
    def fail() -> None:
        print("the reason")
        raise RuntimeError

    with pytest.raises(RuntimeError), muted(verbose=False):
        fail()
    assert capsys.readouterr().err == "the reason\n"


def test_verbose_shows_everything(capsys):
    with Console(0, verbose=True).muted():
        print("chatter")
    assert capsys.readouterr().out == "chatter\n"


@pytest.fixture
def chatty_logger(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        yield logger
    logger.setLevel(level)


def test_warnings_and_log_lines_are_hidden_but_errors_are_not(chatty_logger):
    quiet_libraries(verbose=True)
    assert chatty_logger.isEnabledFor(logging.INFO)
    quiet_libraries(verbose=False)
    assert not chatty_logger.isEnabledFor(logging.WARNING)
    assert chatty_logger.isEnabledFor(logging.ERROR)
    with warnings.catch_warnings(record=True) as shown:
        quiet_libraries(verbose=False)
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    assert shown == []
