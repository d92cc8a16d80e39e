"""Planted faults are found by the step that looks for them, and everything else stays as it is."""

import gzip
import json
import re

import pytest
from planted_corpus import QUESTION, planted, prose, records, write_jsonl

from megagpt.cleaning.job import Job, run_job
from megagpt.cleaning.recipe import load_recipe
from megagpt.cleaning.report import report_folder, table


def read_output(folder):
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in gzip.open(path, "rt", encoding="utf-8")]


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaned")
    write_jsonl(folder / "in.jsonl", records())
    write_jsonl(folder / "questions.jsonl", [{"question": QUESTION}, {"question": "Who?"}])
    overrides = [f"evaluation.texts=[{folder / 'questions.jsonl'}]", "evaluation.keys=[question]"]
    report = run_job(Job([folder / "in.jsonl"], folder / "out", load_recipe("web", overrides)))
    return folder, report, {row["id"]: row for row in read_output(folder / "out")}


DROPPED = {
    "german": ("language", "language de"),
    "short": ("quality", "min_words"),
    "repeated lines": ("repetition", "max_duplicate_lines"),
    "repeated words": ("repetition", "max_duplicate_n_grams 5"),
    "bullets": ("quality", "max_bullet_lines"),
    "code": ("c4", "drop_curly_brackets"),
    "contaminated": ("evaluation", "contaminated"),
    "exact": ("exact_duplicates", "exact duplicate"),
    "near": ("near_duplicates", "near duplicate"),
    "empty": ("read", "no text"),
}


def test_each_planted_document_is_dropped_by_its_step(cleaned):
    _, report, kept = cleaned
    found = {(step, reason) for step, record in report.steps.items() for reason in record["dropped"]}
    assert found == set(DROPPED.values())
    for step, reason in DROPPED.values():
        assert report.steps[step]["dropped"][reason]["documents"] == 1, (step, reason)
    assert set(kept) == {row["id"] for row in records()} - set(DROPPED)


def test_documents_and_bytes_add_up(cleaned):
    folder, report, kept = cleaned
    dropped = [tally for step in report.steps.values() for tally in step["dropped"].values()]
    assert report.read["documents"] == len(records())
    assert report.read["bytes"] == sum(len(row["text"].encode()) for row in records())
    assert report.kept["documents"] == len(kept) == report.read["documents"] - sum(t["documents"] for t in dropped)
    assert report.kept["bytes"] == sum(len(row["text"].encode()) for row in kept.values())
    near = report.steps["near_duplicates"]["dropped"]["near duplicate"]
    assert near["bytes"] == len(planted()["near"]["text"].encode())
    text = (report_folder(folder / "out") / "report.txt").read_text()
    assert text.strip() == table(report).strip()
    assert re.search(r"^language +language de +-1 +2\.22% +-0\.00$", text, re.M)
    assert re.search(r"e-mail addresses masked +1$", text, re.M)


def test_good_documents_and_other_fields_stay(cleaned):
    _, _, kept = cleaned
    for seed in range(30):
        assert kept[f"good {seed}"] == {"id": f"good {seed}", "text": prose(seed), "big": 2**70 + seed}
    assert kept["page"]["meta"] == {"n": 1, "ü": [1.5, None]}
    assert list(kept["page"]) == ["id", "text", "meta"]


def test_pages_become_text(cleaned):
    _, _, kept = cleaned
    assert kept["page"]["text"].split() == prose(100).split()


def test_characters_and_spaces_are_mended(cleaned):
    _, _, kept = cleaned
    assert kept["mojibake"]["text"].endswith("The captain didn\u2019t say a word about the caf\u00e9.")
    assert kept["spaces"]["text"] == prose(102)


def test_bad_lines_are_removed(cleaned):
    _, report, kept = cleaned
    assert "cookies" not in kept["cookies"]["text"]
    assert "JavaScript" not in kept["cookies"]["text"]
    counts = report.steps["c4"]["counts"]
    assert counts["lines removed: policy"] == counts["lines removed: javascript"] == 1


def test_personal_data_is_masked(cleaned):
    _, report, kept = cleaned
    ending = "Write to email@example.com or to 192.0.2.1, and not to 192.168.0.1 or v1.2.3.4.5."
    assert kept["personal"]["text"].endswith(ending)
    assert report.steps["personal_data"]["counts"] == {"e-mail addresses masked": 1, "IP addresses masked": 1}


def test_samples_show_what_was_dropped_beside_what_stays(cleaned):
    folder, _, _ = cleaned
    dropped = report_folder(folder / "out") / "dropped"
    names = {f"{step}.{re.sub('[^A-Za-z0-9]+', '-', reason)}.jsonl" for step, reason in DROPPED.values()}
    assert {path.name for path in dropped.iterdir()} == names - {"read.no-text.jsonl"}
    (near,) = map(json.loads, (dropped / "near_duplicates.near-duplicate.jsonl").open())
    assert near["text"].split() == planted()["near"]["text"].split()
    assert near["first_text"] == prose(5)
    path, _, byte = near["first_source"].rpartition(": byte ")
    with open(path, "rb") as file:
        file.seek(int(byte))
        assert json.loads(file.readline())["id"] == "good 5"
    (german,) = map(json.loads, (dropped / "language.language-de.jsonl").open())
    assert german["language"] == "de"
    assert german["score"] > 0.9
    (contaminated,) = map(json.loads, (dropped / "evaluation.contaminated.jsonl").open())
    assert contaminated["contaminated_ngram"] in QUESTION.lower()


def test_no_unfinished_work_is_left(cleaned):
    folder, _, _ = cleaned
    assert {path.name for path in folder.iterdir()} == {"in.jsonl", "questions.jsonl", "out", "out.report"}
