"""Folders of a run's checkpoints by their names, `step-N` (no torch)."""

from megagpt.storage.location import Location

STEP_PREFIX = "step-"


def is_step_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint's."""
    return name.startswith(STEP_PREFIX) and name.removeprefix(STEP_PREFIX).isdecimal()


def step_of(folder: Location) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix(STEP_PREFIX))


def step_folders(directory: Location) -> list[Location]:
    """What has the name of a checkpoint in a directory that is there, complete or not, newest first."""
    named = [path for path in directory.iterdir() if is_step_name(path.name)]
    return sorted(named, key=lambda path: (step_of(path), path.name), reverse=True)
