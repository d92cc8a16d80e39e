"""Steps that change texts: HTML, characters, white space, personal data."""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.ftfy import FTFYFormatter
from datatrove.pipeline.formatters.pii import PIIFormatter
from resiliparse.extract.html2text import extract_plain_text

from megagpt.cleaning import recipe
from megagpt.cleaning.ledger import Dropped, Ledger

_TAGS = "html|head|body|div|span|p|br|a|ul|ol|li|table|tr|td|th|h[1-6]|b|i|em|strong|img|script|style|meta|link|section"
_DOCUMENT = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
_FRAGMENT = re.compile(rf"\s*<(?:{_TAGS})\b[^<>]*>", re.I)
_TAG = re.compile(rf"</?(?:{_TAGS})\b[^<>]*>", re.I)
_MIN_SHARE_OF_TAGS = 0.05


def looks_like_html(text: str) -> bool:
    """Whether a text is a page or a fragment of HTML, rather than one that speaks of it.

    A fragment starts with a tag, or has tags with end tags among them in a twentieth of its characters.
    """
    if "<" not in text:
        return False
    if _DOCUMENT.match(text):
        return True
    tags = [found.group() for found in _TAG.finditer(text)]
    if not any(tag.startswith("</") for tag in tags):
        return False
    return bool(_FRAGMENT.match(text)) or sum(map(len, tags)) > _MIN_SHARE_OF_TAGS * len(text)


class TextStep(BaseFilter):
    """A step that may change a text, and drops a document if nothing remains."""

    type = "megagpt"

    def __init__(self, ledger: Ledger):
        super().__init__(exclusion_writer=Dropped(ledger, self.name))
        self._record = ledger.steps[self.name]

    def change(self, text: str) -> str:
        """The new text."""
        raise NotImplementedError

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Change a document."""
        text = self.change(document.text)
        if not text.strip():
            return False, "no text"
        if text != document.text:
            document.text = text
            self._record.changed += 1
        return True


class HtmlToText(TextStep):
    """HTML to text by resiliparse.

    datatrove's extractor is trafilatura: twelve times slower, and in a process of its own with a time limit, so that
    the result depends on how busy the machine is; by its default also on which documents came before.
    """

    name = "html"

    def __init__(self, options: recipe.Html, ledger: Ledger):
        super().__init__(ledger)
        self._all = options.which == "all"
        self._main = options.content == "main"

    def change(self, text: str) -> str:
        """The text of a page; where no article is found, all of it."""
        if not (self._all or looks_like_html(text)):
            return text
        if self._main and (found := _plain(text, main_content=True)).strip():
            return found
        return _plain(text)


def _plain(text: str, main_content: bool = False) -> str:
    return extract_plain_text(text, main_content=main_content, alt_texts=False, comments=False)


class MendUnicode(TextStep):
    """Characters, by datatrove's formatter around ftfy."""

    name = "unicode"

    def __init__(self, options: recipe.Unicode, ledger: Ledger):
        super().__init__(ledger)
        # The formatter's defaults leave alone what models should see: curly quotes, ligatures, full-width forms.
        self._formatter = FTFYFormatter(
            normalization=None if options.form == "as_is" else options.form,
            fix_encoding=options.fix_encoding,
            unescape_html="auto" if options.fix_encoding else False,
        )

    def change(self, text: str) -> str:
        """Mend a text."""
        return self._formatter.format(text)


_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACE = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BEFORE_LINE_END = re.compile(r"[ \t]+(?=\n|\Z)")
_SPACES_INSIDE = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)|(?<=\S)\t(?=\S)")
_EMPTY_LINES = re.compile(r"\n{3,}")


class TidyWhitespace(TextStep):
    """White space."""

    name = "whitespace"

    def __init__(self, options: recipe.Whitespace, ledger: Ledger):
        super().__init__(ledger)
        self._collapse = options.collapse

    def change(self, text: str) -> str:
        """Tidy a text."""
        if not text.isascii():
            text = _SPACE.sub(" ", _INVISIBLE.sub("", text))
        text = _BEFORE_LINE_END.sub("", _LINE_END.sub("\n", text))
        if self._collapse:
            text = _SPACES_INSIDE.sub(" ", text)
        return _EMPTY_LINES.sub("\n\n", text).strip("\n").rstrip()


# RFC 5321, section 4.5.3.1
_LONGEST_MAILBOX, _LONGEST_DOMAIN = 64, 256


class MaskPersonalData(TextStep):
    """Personal data, by datatrove's patterns for e-mail and IPv4 addresses, and the recipe's own.

    datatrove takes its replacements in turn over all documents of a task; here there is one of each kind.
    """

    name = "personal_data"

    def __init__(self, options: recipe.PersonalData, ledger: Ledger):
        super().__init__(ledger)
        found = PIIFormatter()
        self._masks_emails, self._emails = options.emails, found.emails_replacer.regex
        self._masks_ips, self._ips = options.ips, found.ip_replacer
        self._replacements = options.email_replacement, options.ip_replacement
        self._patterns = [(re.compile(pattern.regex), pattern.replacement) for pattern in options.patterns]

    def change(self, text: str) -> str:
        """Mask what is found."""
        if self._masks_emails and "@" in text:
            text = self._mask_emails(text)
        if self._masks_ips and text.count(".") > 2:
            text = self._mask_ips(text)
        for pattern, replacement in self._patterns:
            text, number = pattern.subn(replacement, text)
            self._count(f"matches of {pattern.pattern} masked", number)
        return text

    def _count(self, what: str, number: int) -> None:
        if number:
            self._record.counts[what] = self._record.counts.get(what, 0) + number

    def _mask_emails(self, text: str) -> str:
        """Look around each @ only: on a long run of letters the pattern takes quadratic time."""
        parts, done, at = [], 0, text.find("@")
        number = 0
        while at >= 0:
            start = max(done, at - _LONGEST_MAILBOX)
            window = text[start : at + _LONGEST_DOMAIN]
            for found in self._emails.finditer(window):
                if found.start() < at - start < found.end():
                    parts += [text[done : start + found.start()], self._replacements[0]]
                    done = start + found.end()
                    number += 1
            at = text.find("@", max(at + 1, done))
        self._count("e-mail addresses masked", number)
        return "".join([*parts, text[done:]])

    def _mask_ips(self, text: str) -> str:
        number = 0

        def replace(found: re.Match[str]) -> str:
            nonlocal number
            # A part of a longer number or of a name is no address, nor is a private one a person's.
            around = text[max(found.start() - 1, 0) : found.start()] + text[found.end() : found.end() + 1]
            if re.search(r"\w", around) or text[max(found.start() - 1, 0)] == "." or not self._ips.validator(found[0]):
                return found[0]
            number += 1
            return self._replacements[1]

        text = self._ips.regex.sub(replace, text)
        self._count("IP addresses masked", number)
        return text
