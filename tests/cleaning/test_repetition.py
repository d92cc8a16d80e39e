"""N-grams by numbers against datatrove's strings: the same decisions, for the same reasons."""

import random

from datatrove.data import Document
from datatrove.pipeline.filters.gopher_repetition_filter import (
    GopherRepetitionFilter,
    find_all_duplicate,
    find_top_duplicate,
    get_n_grams,
)
from planted_corpus import prose, records

from megagpt.cleaning.ledger import Ledger
from megagpt.cleaning.recipe import Repetition
from megagpt.cleaning.repetition import NGrams, RepetitionFilter
from megagpt.cleaning.words import WORDS

REASONS = {f"top_{n}_gram": f"max_top_n_grams {n}" for n in (2, 3, 4)}
REASONS |= {f"duplicated_{n}_n_grams": f"max_duplicate_n_grams {n}" for n in range(5, 11)}


def repetitive(rng):
    words = [chr(97 + number) * 4 for number in range(rng.choice([2, 5, 20]))]  # no two joins of words are the same
    made = [rng.choice(words) for _ in range(rng.randrange(0, 120))]
    if made:
        copied = made[: rng.randrange(len(made))]
        made += copied * rng.randrange(3)
    return made


def test_counts_are_datatroves():
    rng = random.Random(0)
    for _ in range(300):
        words = repetitive(rng)
        grams = NGrams(words)
        for n in (2, 3, 4, 5, 10, 1):
            strings = get_n_grams(words, n)
            assert grams.top_characters(n) == (find_top_duplicate(strings) if strings else 0), (words, n)
            assert grams.duplicate_characters(n) == find_all_duplicate(words, n), (words, n)


def test_decisions_are_datatroves():
    rng = random.Random(1)
    ours = RepetitionFilter(Repetition(), Ledger(["repetition"], 0, 1))
    theirs = GopherRepetitionFilter(language=WORDS)
    texts = [" ".join(repetitive(rng) + prose(number).split()) for number in range(200)]
    texts += [row["text"] for row in records() if row["text"].strip()]
    seen = set()
    for text in texts:
        expected = theirs.filter(Document(text, ""))
        if expected is not True:
            expected = (False, REASONS.get(expected[1], expected[1]))
            seen.add(expected[1])
        assert ours.filter(Document(text, "")) == expected
    assert len(seen) > 4
