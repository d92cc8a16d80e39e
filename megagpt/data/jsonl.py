"""One JSON object a line: the texts of a line, and what is wrong with it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from megagpt.tokenization.tokenizer import encoding_fault

_fast_loads: Callable[[bytes], Any]
try:
    from orjson import loads as _fast_loads

    _REFUSES_SURROGATES = True
except ModuleNotFoundError:  # part of the `data` extra: only faster
    from json import loads as _fast_loads

    _REFUSES_SURROGATES = False


class BadLineError(Exception):
    """A line or file is no document.

    Args:
        why: what is wrong.
        fix: what would help.
    """

    def __init__(self, why: str, fix: str = "mend the line"):
        super().__init__(why)
        self.fix = fix


def parse_texts(line: bytes, text_keys: Sequence[str]) -> list[str]:
    """The texts of one line, in the order of the keys.

    Raises:
        BadLineError: the line is not UTF-8, not a JSON object, or has no string under a key.
    """
    try:
        record = _fast_loads(line)
        texts = [record[key] for key in text_keys]
        for text in texts:
            if type(text) is not str:
                return _parse_slowly(line, text_keys)
    except (ValueError, KeyError, TypeError, RecursionError):
        return _parse_slowly(line, text_keys)
    # Only escapes spell lone surrogates.
    if not _REFUSES_SURROGATES and b"\\u" in line:
        return _parse_slowly(line, text_keys)
    return texts


def parse_string(content: str) -> str:
    """The text of a JSON string, given without its quotes; halves of surrogate pairs stay as they are.

    Raises:
        ValueError: it is none.
    """
    try:
        return _fast_loads(f'"{content}"'.encode())
    except ValueError:
        return json.loads(f'"{content}"')


def _parse_slowly(line: bytes, text_keys: Sequence[str]) -> list[str]:
    """By the standard library alone, which decides what is JSON, and says what is not."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte {error.start} of the line is not UTF-8") from None
    except ValueError as error:
        raise BadLineError(f"not JSON ({error})") from None
    except RecursionError:
        raise BadLineError("not JSON that can be read (nested too deeply)") from None
    return texts_of(record, text_keys)


def texts_of(record: Any, text_keys: Sequence[str]) -> list[str]:
    """The texts of a parsed line.

    Raises:
        BadLineError: it is not a JSON object, or has no string under a key.
    """
    if not isinstance(record, dict):
        raise BadLineError(f"not a JSON object but {type(record).__name__}")
    for key in text_keys:
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            raise BadLineError(f"no key {key!r} (keys: {keys})", "name the text's key by --json-keys, mend the line")
        text = record[key]
        if not isinstance(text, str):
            raise BadLineError(
                f"the value of {key!r} is not a string but {type(text).__name__}",
                "name another key by --json-keys, mend the line",
            )
        if (fault := encoding_fault(text)) is not None:
            raise BadLineError(f"{key!r} is not valid Unicode: {fault}")
    return [record[key] for key in text_keys]
