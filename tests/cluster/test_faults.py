"""Runs that meet faults end as if they had not, or say what has stopped them; and the doctor finds what ails a node.

A run meets several of them, one after the other, as most of the time goes into starting it. `drill.py` has each one met
by itself, and more often.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from ailments import AILMENTS, examine
from bed import running_cluster
from faults import FAULTS
from rehearsal import Rehearsal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

COURSES = {
    "ranks, nodes and links": (
        *("nan once", "link cut for 6 s", "rank killed", "rank stopped", "newest checkpoint damaged", "requeue"),
        "link cut",
    ),
    "a flipped bit": ("bit flipped",),
}
WAITING_COURSE = ("disk full", "scancel", "slurmd killed")
"""Most of its time goes into waiting for Slurm."""
ELSEWHERE = {"time limit", "nan that stays", "node lost"}
"""They take minutes of waiting, are tested on local ranks, or on three nodes."""


@pytest.fixture(scope="module")
def waiting_course(cluster) -> Iterator["Future[None]"]:
    """A course that takes place on a cluster of its own beside the other tests."""

    def take() -> None:
        with running_cluster() as own:
            Rehearsal(own).drill(*(FAULTS[name] for name in WAITING_COURSE))

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(take)


@pytest.fixture(scope="module")
def rehearsal(cluster, waiting_course) -> Rehearsal:
    return Rehearsal(cluster)


@pytest.mark.parametrize("course", COURSES)
def test_a_run_outlives_its_faults_or_says_what_has_stopped_it(rehearsal, course: str) -> None:
    rehearsal.drill(*(FAULTS[name] for name in COURSES[course]))


def test_a_run_that_has_lost_a_node_goes_on_with_one_that_is_free() -> None:
    with running_cluster(3) as cluster:
        Rehearsal(cluster).drill(FAULTS["node lost, another one free"])


def test_no_fault_is_forgotten() -> None:
    known = {name for name, fault in FAULTS.items() if fault.num_nodes == 2}
    assert known - ELSEWHERE == {name for course in (*COURSES.values(), WAITING_COURSE) for name in course}


def test_the_doctor_passes_a_healthy_cluster(rehearsal) -> None:
    findings, printed = examine(rehearsal.cluster, rehearsal.run(4))
    assert findings, printed
    assert {finding["status"] for finding in findings} == {"OK"}, printed


@pytest.mark.parametrize("group", sorted({ailment.group for ailment in AILMENTS.values() if ailment.group}))
def test_the_doctor_finds_what_ails_a_node(rehearsal, group: int) -> None:
    planted = {name: ailment for name, ailment in AILMENTS.items() if ailment.group == group}
    findings, printed = examine(rehearsal.cluster, rehearsal.run(4), tuple(planted.values()))
    for name, ailment in planted.items():
        assert ailment.is_in(findings), f"{name}\n{printed}"


def test_a_run_outlives_full_disks_and_what_becomes_of_its_job(waiting_course) -> None:
    waiting_course.result()
