"""What is asked of Slurm again, and what is not."""

from pathlib import Path

import pytest

from megagpt.supervise.slurm import NoAnswerError, ask


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ("Requested operation is presently disabled for job 77", True),
        ("slurm_load_jobs error: Invalid job id specified", True),
        ("Job is pending execution for job 77", True),
        ("Requested node configuration is not available for job 77", True),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", False),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", False),
        ("Invalid authentication credential", False),
        ("Job can not be altered now, try again later for job 77", False),
        ("Job update not available right now, the DB index is being set, try again in a bit for job 77", False),
        ("", False),
    ],
)
def test_only_what_may_be_different_a_minute_later(tmp_path: Path, capfd, words: str, is_refused: bool) -> None:
    command = ("bash", "-c", f'echo tried >>"{tmp_path}/tries"; echo "{words}" >&2; exit 1')
    if is_refused:
        assert ask(*command, pauses=(0.0, 0.0)) is None
    else:
        with pytest.raises(NoAnswerError, match=r"Slurm does not answer `bash -c \.\.\.`, as printed above"):
            ask(*command, pauses=(0.0, 0.0))
    assert len((tmp_path / "tries").read_text().splitlines()) == (1 if is_refused else 3)
    assert words in capfd.readouterr().err


def test_without_slurm_nobody_waits() -> None:
    assert ask("no-such-command", pauses=(60.0,)) is None
