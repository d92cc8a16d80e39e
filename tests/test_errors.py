"""What is to be mended before a run is started again, and what may pass by itself."""

import errno

import pytest

from megagpt.errors import CheckpointError, DataError, StorageError, exit_code_of


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN])
def test_a_file_system_that_is_away_may_come_back(number: int) -> None:
    assert exit_code_of(OSError(number, "")) == 75


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_a_full_disk_is_to_be_mended(number: int) -> None:
    assert exit_code_of(OSError(number, "")) == 2


def test_an_error_knows_its_status_also_on_another_rank() -> None:
    import pickle

    assert exit_code_of(StorageError("refused")) == 2
    for kind in (CheckpointError, DataError, StorageError):
        error = pickle.loads(pickle.dumps(kind("away", 75)))
        assert (str(error), exit_code_of(error)) == ("away", 75)
