"""Groups of duplicates, signatures in pieces, words, HTML by its looks."""

import numpy as np
import pytest

from megagpt.cleaning.duplicates import NearSignature, groups
from megagpt.cleaning.recipe import Evaluation, NearDuplicates, PersonalData
from megagpt.cleaning.words import WORDS


def test_groups_against_a_plain_search():
    rng = np.random.default_rng(0)
    for number in (0, 1, 7, 300):
        pairs = rng.integers(0, 400, (number, 2)).astype(np.uint64)
        neighbours: dict[int, set[int]] = {}
        for one, other in pairs.tolist():
            neighbours.setdefault(one, set()).add(other)
            neighbours.setdefault(other, set()).add(one)
        first: dict[int, int] = {}
        for start in sorted(neighbours):
            todo = [start]
            while todo:
                node = todo.pop()
                if node not in first:
                    first[node] = start
                    todo += neighbours[node]
        expected = sorted((node, root) for node, root in first.items() if node != root)
        assert list(zip(*(found.tolist() for found in groups(pairs)), strict=True)) == expected


def test_a_long_chain_is_one_group():
    nodes = np.random.default_rng(1).permutation(np.arange(5000, dtype=np.uint64))
    gone, firsts = groups(np.stack([nodes[:-1], nodes[1:]], axis=1))
    assert gone.tolist() == list(range(1, 5000))
    assert set(firsts.tolist()) == {0}


def test_signatures_in_pieces_are_datatroves(tmp_path):
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    step = NearSignature(tmp_path, NearDuplicates())
    for number in (1, 1024, 1025, 5000):
        shingles = np.random.default_rng(number).integers(0, 2**64, (number, 1), dtype=np.uint64)
        assert step.get_signature(shingles) == MinhashDedupSignature.get_signature(step, shingles)


def test_words_and_sentences():
    assert WORDS.word_tokenize("one two\n three") == ["one", "two", "three"]
    assert WORDS.word_tokenize("caf\u00e9 \u4f60\u597d yes") == ["caf\u00e9", "\u4f60", "\u597d", "yes"]
    text = 'He said "no." Then v1.2 came! \u4f60\u597d\u3002\u518d\u89c1\u3002'
    assert WORDS.sent_tokenize(text) == ['He said "no."', "Then v1.2 came!", "\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]
    assert "".join(text[start:end] for start, end in WORDS.span_tokenize(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- a --> <!DOCTYPE HTML><title>x", True),
        ("<p>One.</p><p>Two.</p>", True),
        ("Hello <b>you</b> there, <i>my</i> friend", True),
        ("In HTML, <p> starts a paragraph and </p> ends it; " + "there is much to say about that. " * 20, False),
        ("if a < b and c > d", False),
        ("vector<int> x; map<string, int> y;", False),
        ("plain", False),
    ],
)
def test_html_by_its_looks(text, expected):
    from megagpt.cleaning.texts import looks_like_html

    assert looks_like_html(text) is expected


def test_masking_takes_linear_time():
    from megagpt.cleaning.ledger import Ledger
    from megagpt.cleaning.texts import MaskPersonalData

    step = MaskPersonalData(PersonalData(), Ledger(["personal_data"], 1, 1))
    text = "a/b+" * 500_000 + " me@example.org, x@y.z.example.com"
    masked = step.change(text)
    assert masked.endswith(" email@example.com, email@example.com")
    assert len(masked) < len(text) + 10


def test_evaluation_texts_need_their_keys():
    assert Evaluation(texts=("a",)).n_grams == 13
