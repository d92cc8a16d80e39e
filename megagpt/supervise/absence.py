"""Hosts whose ranks have not come to the start of a run are left out of the next one (no torch)."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from megagpt.errors import MissingRanksError
from megagpt.parallel.master import expand_hostlist
from megagpt.plan import Plan
from megagpt.supervise.beats import FOLDER, BeatFolder, Verdict, name_of_start


@contextlib.contextmanager
def noting_absence(plan: Plan, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Write down which of Slurm's hosts have sent no rank, where the next start will look for what has ended this one.

    Args:
        plan: gives the shared folder.
        environ: variables of this rank, with the hosts of its job.
    """
    try:
        yield
    except MissingRanksError as error:
        hosts = expand_hostlist(environ.get("SLURM_JOB_NODELIST", ""))
        absent = [host for host in hosts if host not in error.present_hosts]
        if absent and plan.run.shared_folder is not None:
            with contextlib.suppress(OSError):
                folder = BeatFolder(Path(plan.run.shared_folder) / FOLDER / name_of_start())
                folder.create()
                folder.pass_verdict(
                    Verdict(kind="lost", by=0, text=str(error), culprits=[], hosts=absent, exit_code=error.exit_code)
                )
        raise
