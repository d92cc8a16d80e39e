"""A job inside a container: the image, and the folders that it must see."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import ConfigError
from megagpt.submission.jobs import Job


def in_container(job: Job, image: str, mounts: Sequence[str] = ()) -> Job:
    """The same job in a container.

    The working directory is mounted by the batch file; what the job reads and writes elsewhere is mounted too.

    Args:
        job: as it would run without.
        image: a .sif file (Apptainer), else what Pyxis takes: a .sqsh file or an image of a registry.
        mounts: further `HOST:CONTAINER` folders.

    Raises:
        ConfigError: an image's file does not exist, or a mount is malformed.
    """
    problems = []
    if image.endswith((".sif", ".sqsh")) and not Path(image).is_file():
        problems.append(f"--container={image}: there is no such file; check the path")
    problems += [
        f"--container-mounts={mount} is not of the form HOST:CONTAINER; separate several by commas"
        for mount in mounts
        if mount.count(":") not in (1, 2) or not all(mount.split(":"))
    ]
    if problems:
        raise ConfigError(problems)
    found = [f"{folder}:{folder}" for folder in folders_outside(job.paths)]
    variables = {"CONTAINER": image}
    if mounts or found:
        variables["CONTAINER_MOUNTS"] = ",".join([*mounts, *(mount for mount in found if mount not in mounts)])
    return dataclasses.replace(job, variables={**job.variables, **variables})


def folders_outside(paths: Sequence[str]) -> list[Path]:
    """Existing folders outside the working directory which hold some paths; none of them within another."""
    here = Path.cwd().resolve()
    folders = set()
    for text in (path for path in paths if "://" not in path):
        path = Path(re.split(r"[*?\[]", text)[0]).absolute()
        folder = path if path.is_dir() else path.parent
        folder = next(found for found in (folder, *folder.parents) if found.exists()).resolve()
        if not folder.is_relative_to(here) and folder != Path("/"):
            folders.add(folder)
    return [folder for folder in sorted(folders) if folders.isdisjoint(folder.parents)]
