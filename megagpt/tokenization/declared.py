"""What lies at a tokenizer's path, and which special tokens are declared there."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megagpt.errors import DataError

Kind = Literal["sentencepiece", "huggingface", "tiktoken"]

HF_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
# A line of a tiktoken file: the bytes of a token in base64, and its rank.
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?$")
_HINT = "give a sentencepiece .model, a Hugging Face tokenizer.json or its folder, or a .tiktoken file"


@dataclass(frozen=True)
class Declared:
    """Special tokens by role, as texts, and what else the files beside a tokenizer say.

    `settings` are the entries of tokenizer_config.json (and special_tokens_map.json) that have an influence on ids.
    """

    eod: str | None = None
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def find_tokenizer(path: str | Path) -> tuple[Path, Kind, bytes]:
    """The tokenizer file at a path (a file, or a folder that holds tokenizer.json or one of the others), its kind as
    its content shows, and the content.

    Raises:
        DataError: there is no such file, it cannot be read, or it is none of the three kinds.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"tokenizer {path} does not exist; train one with tools/train_tokenizer.py") from None
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read ({error.strerror}); {_HINT}") from None
    start = content.lstrip()[:1]
    if start == b"{":
        return path, "huggingface", content
    if _RANK_LINE.match(content.split(b"\n", 1)[0]):
        return path, "tiktoken", content
    return path, "sentencepiece", content


def _file_in(folder: Path) -> Path:
    if (folder / HF_FILE).is_file():
        return folder / HF_FILE
    others = sorted(path for pattern in ("*.model", "*.tiktoken") for path in folder.glob(pattern))
    if len(others) == 1:
        return others[0]
    found = "several: " + ", ".join(path.name for path in others) if others else "none"
    raise DataError(f"tokenizer {folder} is a folder without {HF_FILE} (other tokenizer files: {found}); {_HINT}")


def read_declared(folder: Path) -> Declared:
    """What tokenizer_config.json, and special_tokens_map.json where it says more, declare.

    Raises:
        DataError: a file is there but is not a JSON object.
    """
    settings: dict[str, Any] = {}
    for name in (SPECIAL_FILE, CONFIG_FILE):
        settings |= _read_object(folder / name)
    return Declared(
        eod=_text(settings.get("eos_token")),
        bos=_text(settings.get("bos_token")),
        pad=_text(settings.get("pad_token")),
        unk=_text(settings.get("unk_token")),
        settings=settings,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); mend or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object but {type(content).__name__}; mend or remove it")
    return content


def _text(token: Any) -> str | None:
    """A token is written as its text, or as an object with the text under `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
