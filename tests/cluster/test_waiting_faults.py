"""Runs that meet faults after which Slurm makes them wait: these drills go on beside all other tests of this folder.

By their name its tests, which wait for the drills, come last.
"""

import functools

import pytest
from bed import running_cluster
from faults import FAULTS
from rehearsal import Rehearsal
from test_faults import COURSE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

COURSES = {
    "disks and Slurm": ("disk full", "scancel", "link cut", "slurmd killed"),
    "a flipped bit": ("bit flipped",),
    "a lost node": ("node lost, another one free",),
}
ELSEWHERE = {"time limit", "nan that stays", "node lost", "first node lost, another one free"}
"""They take minutes more, or are tested on local ranks; `drill.py` has them met."""


def drill(course: str) -> None:
    """Have a run on a cluster of its own meet some faults."""
    faults = [FAULTS[name] for name in COURSES[course]]
    with running_cluster(faults[0].num_nodes) as cluster:
        Rehearsal(cluster).drill(*faults)


DRILLS = {course: functools.partial(drill, course) for course in COURSES}


@pytest.mark.parametrize("course", COURSES)
def test_a_run_outlives_its_faults_or_says_what_has_stopped_it(background, course: str) -> None:
    background[course].result()


def test_no_fault_is_forgotten() -> None:
    met = {name for course in (COURSE, *COURSES.values()) for name in course}
    assert met | ELSEWHERE == set(FAULTS)
    assert not met & ELSEWHERE
