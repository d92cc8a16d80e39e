"""Every key of the run config with type, default and meaning, taken from the schema itself."""

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from megagpt.plan.config import RunConfig, Section


def config_reference(width: int = 100) -> str:
    """The reference as text, one section after the other.

    Args:
        width: characters per line.
    """
    lines = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines += [f"{name}: {' '.join((section.__doc__ or '').split())}"]
        for key, sub in section.model_fields.items():
            lines.append(f"  {key}{_default(sub)}")
            meaning = " ".join((sub.description or "").split())
            lines += textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines).rstrip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        # Some are filled in from other keys while the config is read; their text says from which.
        return "" if "default:" in (field.description or "") else " (required)"
    default: Any = field.get_default(call_default_factory=True)
    return "" if default is None else f" = {json.dumps(default)}"
