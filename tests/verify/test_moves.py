"""Moves between layouts go on along the same curve, and the table tells of one that does not."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture
def sides():
    from megagpt.verify.moves import SIDES

    names = {"one process, micro-batch 4", "TP 4, SP", "DP 2, ZeRO 3"}
    return tuple(side for side in SIDES if side.name in names)


def measure(sides, moments_are_lost: bool = False):
    from megagpt.checkpoint.restore import Restorer
    from megagpt.verify.moves import measure_moves

    if moments_are_lost:
        Restorer.has_moments = lambda self, reader: False
    return measure_moves({"Layouts": ("llama", sides)}, told=lambda line: None)


def in_one_process(function, *arguments):
    """Leave this process as it was; the ranks are its children's."""
    return run_ranks(function, 1, *arguments, timeout=300)[0]


def test_every_move_between_three_layouts_goes_on_along_the_curve(sides):
    from megagpt.verify.moves import render

    found = in_one_process(measure, sides)
    moves = found["Layouts"]
    assert len(moves) == 6
    assert [move.difference for move in moves if not move.passed] == []
    document = render(found, 1.0)
    assert "6 of 6 moves are within their bounds" in document
    assert "| from \\ to | one process, micro-batch 4 | TP 4, SP | DP 2, ZeRO 3 |" in document
    assert document.count("e-0") >= 3


def test_a_move_that_loses_the_moments_is_told(sides):
    found = in_one_process(measure, sides[:2], True)
    assert not any(move.passed for move in found["Layouts"])
