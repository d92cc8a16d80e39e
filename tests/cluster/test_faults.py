"""Runs that meet faults end as if they had not, or say what has stopped them; and the doctor finds what ails a node.

A run meets several of them, one after the other, as most of the time goes into starting it. `drill.py` has each one met
by itself, and more often; those that take long are met in `test_waiting_faults.py`.
"""

import pytest
from ailments import AILMENTS, examine
from faults import FAULTS
from rehearsal import Rehearsal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

COURSE = ("nan once", "link cut for 6 s", "rank killed", "rank stopped", "newest checkpoint damaged", "requeue")


@pytest.fixture(scope="module")
def rehearsal(cluster) -> Rehearsal:
    return Rehearsal(cluster)


def test_a_run_outlives_faults_of_its_ranks_and_of_what_they_compute(rehearsal) -> None:
    rehearsal.drill(*(FAULTS[name] for name in COURSE))


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
