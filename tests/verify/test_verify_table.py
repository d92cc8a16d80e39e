"""The table of verified layouts: its document lists its rows, some of them hold here and now, and a wrong one shows."""

from pathlib import Path
from unittest import mock

import pytest

from megagpt.verify.rows import MAX_RANKS, ROWS, Row

pytestmark = pytest.mark.usefixtures("libraries")

DOCUMENT = Path(__file__).parents[2] / "tools" / "LAYOUTS.md"


def test_the_document_lists_exactly_the_rows():
    from megagpt.verify.table import key_of, listed_rows

    assert list(listed_rows(DOCUMENT.read_text())) == [key_of(row) for row in ROWS], "run: python tools/verify_table.py"


def test_the_document_says_that_all_rows_hold():
    text = DOCUMENT.read_text()
    assert f"{len(ROWS)} of {len(ROWS)} rows are within their bounds" in text
    assert "**missed**" not in text


def test_the_table_covers_what_is_promised():
    assert len({row.key for row in ROWS}) == len(ROWS) >= 40
    plans = [row.plan() for row in ROWS]
    assert max(plan.world_size for plan in plans) <= MAX_RANKS
    assert {plan.precision for plan in plans} == {"fp32", "bf16", "fp16"}
    assert {plan.zero_stage for plan in plans} == {1, 2, 3}
    assert {row.optimizer for row in ROWS} == {"sgd", "adamw"}


CHOSEN = (
    ("llama", "sgd", "fp32", {"tp": 2, "dp": 2, "zero": 3}),
    ("mixtral", "adamw", "fp32", {"dp": 2, "ep": 2}),
    ("llama", "adamw", "bf16", {"tp": 2, "pp": 2}),
)


def test_some_rows_hold_here_and_now():
    from megagpt.verify.table import key_of, line_of, measure_rows, render

    rows = [
        row
        for row in ROWS
        for model, optimizer, precision, layout in CHOSEN
        if (row.model, row.optimizer, row.precision) == (model, optimizer, precision)
        and {key: value for key, value in row.layout.items() if key != "precision"} == layout
    ]
    assert len(rows) == len(CHOSEN)
    lines: list[str] = []
    measured = measure_rows(rows, lines.append)
    assert [one.wrong for one in measured] == [[], [], []]
    assert len(lines) == 3
    assert all(": ok, " in line for line in lines)
    assert "3 of 3 rows are within their bounds" in render({key_of(one.row): line_of(one) for one in measured})


def test_a_wrong_row_is_shown_as_missed(tmp_path, capsys):
    """Gradients of sequence-parallel norms are not summed."""
    from megagpt.verify.table import write_table

    rows = [Row("Faults", "gpt2", "sgd", {"tp": 2, "sp": True})]
    with mock.patch("megagpt.engine.weights.sum_partial_gradients"):
        assert not write_table(rows, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "0 of 1 rows are within their bounds" in text
    assert "**missed**: loss, gradient norm" in text
    assert "MISSED (loss, gradient norm" in capsys.readouterr().out
    rows.append(Row("More", "gpt2", "sgd", {}))
    assert write_table(rows, tmp_path / "table.md", only_new=True), "what was missed is measured again"
    assert capsys.readouterr().out.count(": ok, ") == 2
    assert write_table(rows[::-1], tmp_path / "table.md", only_new=True)
    text = (tmp_path / "table.md").read_text()
    assert ": ok, " not in capsys.readouterr().out
    assert text.index("## More") < text.index("## Faults")
    assert "2 of 2 rows are within their bounds" in text


def test_a_row_whose_rank_fails_leaves_its_companions(tmp_path):
    from megagpt.verify import measure
    from megagpt.verify.table import measure_rows

    original = measure.measure_run

    def measure_run(plan, ranks):
        if plan.zero_stage == 2 and ranks.rank == 1:
            raise ValueError("a planted error")
        return original(plan, ranks)

    rows = [Row("Faults", "llama", "sgd", {"dp": 2, "zero": zero}) for zero in (1, 2)]
    with mock.patch.object(measure, "measure_run", measure_run):
        good, failed = measure_rows(rows, lambda line: None)
    assert good.wrong == []
    assert failed.wrong == ["ValueError: a planted error"]
