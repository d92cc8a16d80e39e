"""Experts that were saved on one expert-parallel layout go on on another one."""

import pytest
from ranks import run_ranks
from test_checkpoints import HALF, curve, plan_in
from tiny import ADAM

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ({"dp": 2, "ep": 2}, [{"dp": 2}, {"tp": 2, "sp": True, "dp": 2, "ep": 2}, {"cp": 2, "ep": 2}]),
        ({"dp": 2, "zero": 3}, [{"dp": 2, "ep": 2, "zero": 2}]),
    ],
    ids=["from-two-ways", "from-one"],
)
def test_experts_move_between_expert_parallel_sizes(tmp_path, source, targets):
    plan = plan_in(tmp_path, model="mixtral", optimizer=ADAM, **source)
    undisturbed = run_ranks(curve, plan.world_size, plan, save_at=HALF)
    assert run_ranks(curve, plan.world_size, plan, resumes=True) == [values[HALF:] for values in undisturbed]
    expected = undisturbed[0][HALF:]
    for target in targets:
        other = plan_in(tmp_path, model="mixtral", **target)
        values = run_ranks(curve, other.world_size, other, resumes=True)[0]
        assert [v[0] for v in values] == pytest.approx([v[0] for v in expected], abs=1e-5), target
        assert [v[1] for v in values] == pytest.approx([v[1] for v in expected], rel=1e-4), target
