"""Which paragraphs of a documentation text are English prose: no code, tables, parameter lists or boilerplate marks.

The rules are plain counts and patterns, tuned by reading what they keep of Python docstrings.
"""

import re

SHORTEST_DOCUMENT = 160
"""Characters of prose below which a document is not worth keeping."""

_FEWEST_WORDS = 8
_LEAST_FUNCTION_WORDS = 0.2
_LEAST_LETTERS = 0.85
_FUNCTION_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been before both but by can do does each either else
    every first for from has have how if in into is it its may more most must no not of on one only or other our
    out over same should since so some such than that the their them then there these they this those to two under
    until up used use using was we were what when where which while will with within without would you your
    """.split()  # noqa: SIM905 (a list would take a line for each word)
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_BULLET = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+\S")
_ROLE = re.compile(r":[a-zA-Z][\w:.+-]*:`[~!.]?([^`<]*?)(?:\s*<[^`]*>)?`")
_LITERAL = re.compile(r"``([^`]*)``")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^`>]*>`_*")
_ITEM = re.compile(
    r"""\s*(?:
        :(?:param|keyword|attr|ivar)\s(?:[^:]*\s)?(?P<field>[\w.]+):           # :param type name: text
        |[-*]?\s*[`*]{0,2}(?P<name>[A-Za-z_][\w.]*)[`*]{0,2}\s*
            (?:\((?:[^()]|\([^()]*\))*\)\s*:|(?P<typed>(?<=\s):\s)|:(?:\s|$))  # name (type): text; name : type
    )\s*(?P<text>.*)""",
    re.VERBOSE,
)
_FIELD = re.compile(r"\s*:\w+[^:]*:")
_ITEMS_HEADING = re.compile(r"\s*(?:Args|Arguments|Parameters|Params|Attributes|Inputs?|Keyword Args)\s*:?\s*$")
_STARTS_LIKE_PROSE = re.compile(r"(?:[-*] |\d+[.)] )?[\"'(`]?\w")
_CODE = re.compile(r">>>|::|```|\.\. ")
_FEWEST_ITEM_WORDS = 5
# Quotation marks, dashes, the ellipsis, the bullet and the non-breaking space, by code point.
_TYPOGRAPHIC = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "-",
    0x2026: "...",
    0x2022: "-",
}
_TYPOGRAPHIC[0xA0] = " "
_FENCE = re.compile(r"^\s*(```|~~~)")
_NOT_PROSE_LINE = re.compile(
    r"""\s*(?:
        >>>|\.\.\.\s|\.\.\s|\$\s|\||[+=~^`#*_-]{3,}|@|<\w|</|[{}\[\]]  # doctests, directives, tables, rules, markup
        |:\w[^:]*:                                                     # :param x:
        |\#                                                            # headings and comments
        |(?:import|from|def|class|return|if|for|while|with|assert|print)\b.*[(=:\\]\s*$  # statements
        |\*{0,2}[`\w.*\[\]'"]+\*{0,2}(?:\s*,\s*[`\w.*]+)*\s*(?:\([^)]*\))?\s*:(?:\s|$)  # name (type): text
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
    for block in _blocks(text.translate(_TYPOGRAPHIC)):
        paragraph = _described_items(block)
        kept = bool(paragraph)
        if not kept:
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
    if len(words) < _FEWEST_WORDS or not _STARTS_LIKE_PROSE.match(cleaned) or cleaned[-1] not in ".!?:)\"'`":
        return False
    return _reads_like_english(cleaned, words)


def _reads_like_english(text: str, words: list[str]) -> bool:
    """Enough of the words are function words, and enough of the characters letters."""
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return (
        text.isascii()
        and function_words >= _LEAST_FUNCTION_WORDS * len(words)
        and letters >= _LEAST_LETTERS * len(text)
    )


def _described_items(block: str) -> str:
    """A list of described parameters in any of the usual styles as lines `- name: Description.`; "" if it is none.

    Types, and items whose description is too short or no English, are left out.
    """
    lines = block.splitlines()
    heading = bool(_ITEMS_HEADING.match(lines[0]))
    lines = lines[1:] if heading else lines
    first = _ITEM.match(lines[0]) if lines else None
    # Without a heading, `Note: ...` is a sentence.
    if first is None or not (heading or first["field"] or first["name"][0].islower()):
        return ""
    items: list[list[str]] = []
    indent = len(lines[0]) - len(lines[0].lstrip())
    in_item = False
    for line in lines:
        shallow = len(line) - len(line.lstrip()) <= indent
        if shallow and (found := _ITEM.match(line)):
            # After `name :` (numpy's style) the line holds the type.
            items.append([found["field"] or found["name"], "" if found["typed"] else found["text"]])
            in_item = True
        elif in_item and not (shallow and _FIELD.match(line)):
            items[-1].append(line.strip())
        else:
            in_item = False
    described: list[str] = []
    for name, *rest in items:
        description = _clean(" ".join(part for part in rest if part))
        words = _WORD.findall(description)
        if (
            len(words) >= _FEWEST_ITEM_WORDS
            and not _CODE.search(description)
            and _reads_like_english(description, words)
        ):
            described.append(f"- {name}: {description[0].upper()}{description[1:]}".rstrip(".:;, ") + ".")
    return "\n".join(described)


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
    text = "\n".join(re.sub(r"^\* ", "- ", re.sub(r"[ \t]+", " ", line)) for line in lines)
    text = _ROLE.sub(r"\1", text)
    text = _LITERAL.sub(r"`\1`", text)
    text = _LINK.sub(lambda found: found[1] or found[2] or "", text)
    return text.replace("**", "").removesuffix("::").strip() + (":" if text.endswith("::") else "")
