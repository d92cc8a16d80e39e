"""What every run looks at before it starts: can its folders be written to, is its data what it was. No torch here."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megagpt.errors import ConfigError, DataError, RankError, StorageError, exit_code_of
from megagpt.launchers import host_name
from megagpt.parallel.launch import Launch
from megagpt.plan import Plan
from megagpt.storage import RemotePath, location

if TYPE_CHECKING:
    from megagpt.parallel.ranks import Ranks

SECONDS_FOR_THE_FIRST = 5.0


@contextlib.contextmanager
def own_errors(launch: Launch) -> Iterator[None]:
    """What a rank meets before it knows the others it tells by its name: a host may see other files, or none.

    The first rank of a host is given time to do so before the others do: mostly they all see the same, and the launcher
    ends them meanwhile.

    Raises:
        RankError: in place of an error about data or a store, if there are other ranks.
    """
    try:
        yield
    except (DataError, StorageError) as error:
        if launch.world_size == 1:
            raise
        if launch.local_rank != 0:
            time.sleep(SECONDS_FOR_THE_FIRST)
        raise RankError(f"rank {launch.rank} on {host_name()}: {error}", error.exit_code) from None


def require_writable_folders(plan: Plan, ranks: "Ranks") -> None:
    """See on rank 0 that the folders for checkpoints and logs can be made and written to; makes none; collective.

    Raises:
        ConfigError: on all ranks, if one cannot.
    """
    problems, exit_codes = [], []
    for key, directory in (
        ("checkpoint.directory", plan.run.checkpoint.directory),
        ("logging.directory", plan.run.logging.directory),
    ):
        if ranks.rank != 0 or directory is None:
            continue
        place = location(directory)
        if isinstance(place, RemotePath):
            try:
                place.require_writable()
            except StorageError as error:
                problems.append(f"{key}={directory} cannot be written to: {error}")
                exit_codes.append(exit_code_of(error))
            continue
        path = place.absolute()
        nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            problems.append(f"{key}={directory} cannot be written to ({error.strerror}); give a writable folder")
            exit_codes.append(exit_code_of(error))
    problems, exit_codes = ranks.broadcast_object((problems, exit_codes))
    if problems:
        raise ConfigError(problems, exit_code=min(exit_codes))  # what is to be mended comes first


def require_intact_data(plan: Plan, ranks: "Ranks", launch: Launch) -> None:
    """Have the ranks that read datasets compare their checksums, each those of some, if that is asked for; collective.

    Raises:
        DataError: on all ranks, if one differs.
        RankError: on a rank that a store fails.
    """
    from megagpt.data.run_data import damaged_datasets

    readers = [rank for rank in range(ranks.world_size) if plan.reads_samples(rank)]
    mine: list[tuple[str, int]] = []
    if ranks.rank in readers:
        with own_errors(launch):
            mine = damaged_datasets(plan.run.data, readers.index(ranks.rank), len(readers))
    if damaged := [problem for part in ranks.gather_objects(mine) for problem in part]:
        texts, exit_codes = zip(*damaged, strict=True)
        raise DataError("\n".join(texts), min(exit_codes))  # what is to be mended comes first
