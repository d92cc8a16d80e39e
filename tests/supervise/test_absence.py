"""Hosts that have sent no rank are noted where the next start looks."""

import pytest
from tiny import tiny_plan

from megagpt.errors import MissingRanksError
from megagpt.supervise.absence import noting_absence
from megagpt.supervise.beats import FOLDER, BeatFolder


def verdicts(folder):
    return [BeatFolder(path).verdict() for path in (folder / FOLDER).glob("*")]


def test_hosts_without_ranks_are_held_responsible(tmp_path):
    plan = tiny_plan(sections={"logging": {"directory": str(tmp_path)}})
    with (
        pytest.raises(MissingRanksError),
        noting_absence(plan, {"SLURM_JOB_NODELIST": "node[1-3]"}),
    ):
        raise MissingRanksError("2 of 6 ranks have not come", ["node1", "node3"])
    (verdict,) = verdicts(tmp_path)
    assert (verdict.kind, verdict.hosts, verdict.exit_code) == ("lost", ["node2"], 75)
    assert verdict.text == "2 of 6 ranks have not come"


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_NODELIST": "node1"}], ids=str)
def test_nobody_is_where_all_hosts_have_sent_some(tmp_path, environ):
    plan = tiny_plan(sections={"logging": {"directory": str(tmp_path)}})
    with pytest.raises(MissingRanksError), noting_absence(plan, environ):
        raise MissingRanksError("1 of 2 ranks have not come", ["node1"])
    assert verdicts(tmp_path) == []
