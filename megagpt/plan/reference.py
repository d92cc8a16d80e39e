"""Every key of the run config with type, default and meaning, taken from the schema itself."""

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from megagpt.plan.config import RunConfig
from megagpt.plan.section import Section, inner_section


def config_reference(width: int = 100) -> str:
    """The reference as text, one section after the other.

    Args:
        width: characters per line.
    """
    lines = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines += [f"{name}: {' '.join((section.__doc__ or '').split())}", *_keys(section, width, indent=2), ""]
    return "\n".join(lines).rstrip()


def _keys(section: type[Section], width: int, indent: int) -> list[str]:
    """Lines for the keys of a section, and for those of the sections within it."""
    lines = []
    for key, field in section.model_fields.items():
        lines.append(f"{' ' * indent}{key}{_default(field)}")
        meaning = " ".join((field.description or "").split())
        margin = " " * (indent + 4)
        lines += textwrap.wrap(meaning, width, initial_indent=margin, subsequent_indent=margin)
        inner = inner_section(field)
        if inner is not None:
            lines += _keys(inner, width, indent + 4)
    return lines


def _default(field: FieldInfo) -> str:
    if field.is_required():
        # Some are filled in from other keys while the config is read; their text says from which.
        return "" if "default:" in (field.description or "") else " (required)"
    default: Any = field.get_default(call_default_factory=True)
    return "" if default is None else f" = {json.dumps(default)}"
