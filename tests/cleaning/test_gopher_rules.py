"""Gopher's rules against datatrove's filters: the same decisions, for the same reasons."""

import random

from datatrove.data import Document
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import (
    GopherRepetitionFilter,
    find_all_duplicate,
    find_top_duplicate,
    get_n_grams,
)
from planted_corpus import prose, records

from megagpt.cleaning.ledger import Ledger
from megagpt.cleaning.quality import QualityFilter
from megagpt.cleaning.recipe import Quality, Repetition
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


QUALITY = {
    "gopher_short_doc": "min_words",
    "gopher_long_doc": "max_words",
    "gopher_below_avg_threshold": "min_mean_word_length",
    "gopher_above_avg_threshold": "max_mean_word_length",
    "gopher_too_many_hashes": "max_symbols_per_word #",
    "gopher_too_many_ellipsis": "max_symbols_per_word ...",
    "gopher_too_many_bullets": "max_bullet_lines",
    "gopher_too_many_end_ellipsis": "max_ellipsis_lines",
    "gopher_below_alpha_threshold": "min_alphabetic_words",
    "gopher_enough_stop_words": "min_stop_words",
}


def test_judgement_of_quality_is_datatroves():
    rng = random.Random(2)
    ours = QualityFilter(Quality(min_words=5, max_words=150), Ledger(["quality"], 0, 1))
    theirs = GopherQualityFilter(min_doc_words=5, max_doc_words=150, language=WORDS)
    parts = [
        "the",
        "and of",
        "#",
        "...",
        "\u2026",
        "- word",
        "\u2022 x",
        "12",
        "caf\u00e9",
        "extraordinarily",
        "a",
        "?!",
    ]
    parts += ["x\n", "\n", "y...\n"]
    seen = set()
    for number in range(6000):
        chosen = rng.sample(parts, rng.randrange(1, 6)) + (["the lantern that they have"] if number % 2 else [])
        text = " ".join(rng.choices(chosen, k=rng.randrange(1, 60)))
        if not text.strip() or all(not word.strip("#.?!-\u2026\u2022") for word in text.split()):
            continue  # of no words datatrove takes the mean
        expected = theirs.filter(Document(text, ""))
        if expected is not True:
            expected = (False, QUALITY[expected[1]])
            seen.add(expected[1])
        assert ours.filter(Document(text, "")) == expected, text
    assert seen == set(QUALITY.values())


def test_words_to_compare_are_datatroves():
    from datatrove.utils.text import simplify_text

    from megagpt.cleaning.words import simplified_words

    for text in [*(row["text"] for row in records()), "Caf\u00e9, 3.14 \u00c5ngstr\u00f6m! \u4f60\u597d", ""]:
        assert simplified_words(text) == WORDS.word_tokenize(simplify_text(text))


def test_ascii_that_ftfy_is_not_asked_about_stays():
    from megagpt.cleaning.recipe import Unicode
    from megagpt.cleaning.texts import MendUnicode

    step = MendUnicode(Unicode(), Ledger(["unicode"], 0, 1))
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices([chr(code) for code in range(128)], k=rng.randrange(1, 12))) + rng.choice(
            ["&amp;", "<b>", "\x1b[1m", ""]
        )
        assert step.change(text) == step._formatter.format(text), text
