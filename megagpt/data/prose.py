"""Which paragraphs of a documentation text are English prose: no code, tables, parameter lists or boilerplate marks.

The rules are plain counts and patterns, tuned by reading what they keep of Python docstrings.
"""

import re

SHORTEST_DOCUMENT = 200
"""Characters of prose below which a document is not worth keeping."""

_FEWEST_WORDS = 8
_LEAST_FUNCTION_WORDS = 0.22
_LEAST_LETTERS = 0.86
_FUNCTION_WORDS = frozenset(
    "a about after all also an and any are as at be because been before both but by can do does each either else"
    " every first for from has have how if in into is it its may more most must no not of on one only or other our"
    " out over same should since so some such than that the their them then there these they this those to two under"
    " until up used use using was we were what when where which while will with within without would you your".split()
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_BULLET = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+\S")
_ROLE = re.compile(r":[a-zA-Z][\w:.+-]*:`[~!.]?([^`<]*?)(?:\s*<[^`]*>)?`")
_LITERAL = re.compile(r"``([^`]*)``")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^`>]*>`_*")
_FENCE = re.compile(r"^\s*(```|~~~)")
_NOT_PROSE_LINE = re.compile(
    r"""\s*(?:
        >>>|\.\.\.\s|\.\.\s|\$\s|\||[+=~^`#*_-]{3,}|@|<\w|</|[{}\[\]]  # doctests, directives, tables, rules, markup
        |:\w[^:]*:                                                     # :param x:
        |\#                                                            # headings and comments
        |(?:import|from|def|class|return|if|for|while|with|assert|print)\b.*[(=:\\]\s*$   # statements
        |\*{0,2}[`\w.*\[\]'"]+\*{0,2}(?:\s*,\s*[`\w.*]+)*\s*(?:\([^)]*\))?\s*:(?:\s|$)    # name (type): text, name : type
        |[`\w.]+\s*(?:\([^)]*\))?\s+--?\s                              # name -- text
        |(?:Args|Arguments|Parameters|Params|Returns?|Yields?|Raises?|Examples?|Attributes|Inputs?|Outputs?|Shape|Usage
           |Keyword\ Args|See\ Also|References?)\s*:?\s*$
    )""",
    re.VERBOSE,
)


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are English prose, each on one line (lists: one line an item), markup removed."""
    paragraphs: list[str] = []
    last_kept = False
    for block in _blocks(text):
        paragraph = _clean(block)
        kept = is_prose(block, paragraph)
        if not kept and last_kept and paragraphs[-1].endswith(":"):
            # It announced the code or table that is left out.
            paragraphs.pop()
        if kept:
            paragraphs.append(paragraph)
        last_kept = kept
    if paragraphs and paragraphs[-1].endswith(":"):
        paragraphs.pop()
    return paragraphs


def is_prose(block: str, cleaned: str) -> bool:
    """Whether a paragraph, as written and as cleaned, is English prose."""
    if any(_NOT_PROSE_LINE.match(line) for line in block.splitlines()):
        return False
    words = _WORD.findall(cleaned)
    if len(words) < _FEWEST_WORDS or not cleaned[0].isalnum() or cleaned[-1] not in ".!?:":
        return False
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    letters = sum(character.isalpha() or character == " " for character in cleaned)
    return (
        cleaned.isascii()
        and function_words >= _LEAST_FUNCTION_WORDS * len(words)
        and letters >= _LEAST_LETTERS * len(cleaned)
    )


def _blocks(text: str) -> list[str]:
    """Paragraphs between blank lines; fenced code is left out."""
    blocks: list[list[str]] = [[]]
    fenced = False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
            blocks.append([])
        elif fenced:
            continue
        elif line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    return ["\n".join(lines) for lines in blocks if lines]


def _clean(block: str) -> str:
    """Undo line wrapping and remove inline markup."""
    lines: list[str] = []
    for line in block.splitlines():
        if lines and not _BULLET.match(line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    text = "\n".join(re.sub(r"[ \t]+", " ", line) for line in lines)
    text = _ROLE.sub(r"\1", text)
    text = _LITERAL.sub(r"`\1`", text)
    text = _LINK.sub(lambda found: found[1] or found[2] or "", text)
    return text.replace("**", "").removesuffix("::").strip() + (":" if text.endswith("::") else "")
