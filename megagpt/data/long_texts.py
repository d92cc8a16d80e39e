"""Texts of any length to tokens in bounded memory.

A text longer than a bound is cut, and its pieces are encoded one by one. Cuts lie only where that does not change the
tokens: before a word, at a line start or at a word's border, and where encoding the surroundings of the cut at once and
in two halves gives the same tokens. (Tokenizers decide within words or a few characters; a thousand on both sides are
looked at.) Tokenizers that write a mark before each text for the space in front of it lose that one space at a cut.

sentencepiece unigram models add up scores from the start of the text in single precision; cut texts are rounded less.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megagpt.data.jsonl import BadLineError

LONG_CHARACTERS = 1 << 18
"""Longer texts are cut into pieces of about this length."""
_LARGEST_PIECES = 32
_WINDOW = 1000
_TRIALS = 16
# In the order of preference: before a word, behind a line end, at a word's border.
_PLACES = (
    re.compile(r"(?<=\w)(?= \w)"),
    re.compile(r"(?<=\n)(?=\w)"),
    re.compile(r"(?<=\S)(?= \S)|(?<=\w)(?=[^\w\s])"),
)

Encode = Callable[[list[str]], list[Any]]


def cut_into_pieces(fragments: Iterable[str], encode: Encode, piece_characters: int = 0) -> Iterator[str]:
    """Pieces of a text whose tokens, one after the other, are the tokens of the text.

    Args:
        fragments: the text.
        encode: ids of each text (a sequence of integers), without tokens around it.
        piece_characters: about the length of a piece; 0: `LONG_CHARACTERS`.

    Raises:
        BadLineError: there is no place to cut in 32 times that length.
    """
    wanted = piece_characters or LONG_CHARACTERS
    rest = ""
    for fragment in fragments:
        rest += fragment
        while len(rest) > wanted + _WINDOW:
            cut = _find_cut(rest, min(len(rest) - _WINDOW, wanted), encode)
            if cut is None:
                cut = _find_cut(rest, len(rest) - _WINDOW, encode)
            if cut is None:
                if len(rest) > _LARGEST_PIECES * wanted:
                    raise BadLineError(
                        f"{len(rest)} characters of a long text without a place to cut that leaves the tokens alone"
                    )
                break
            yield rest[: cut[0]]
            rest = rest[cut[1] :]
    if rest:
        yield rest


def _find_cut(text: str, before: int, encode: Encode) -> tuple[int, int] | None:
    """Where the left piece ends and the right one starts; both at most `before`."""
    first = max(before - 64 * _WINDOW, _WINDOW // 10, before // 2)
    for pattern in _PLACES:
        for place in reversed(_last_places(pattern, text, first, before)):
            for dropped in (0, 1) if text[place] == " " else (0,):
                if _is_safe(text, place, dropped, encode):
                    return place, place + dropped
    return None


def _last_places(pattern: re.Pattern[str], text: str, first: int, before: int) -> list[int]:
    """The last places of a kind between two; most often they are near the end."""
    for start in (max(before - _WINDOW, first), first):
        places = [found.start() for found in pattern.finditer(text, start, before)]
        if len(places) >= _TRIALS:
            break
    return places[-_TRIALS:]


def _is_safe(text: str, place: int, dropped: int, encode: Encode) -> bool:
    around = text[max(place - _WINDOW, 0) : place + _WINDOW]
    left, right = text[max(place - _WINDOW, 0) : place], text[place + dropped : place + _WINDOW]
    whole, first, second = (list(ids) for ids in encode([around, left, right]))
    return whole == first + second
