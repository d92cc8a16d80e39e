"""What all sections of the run config have in common."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


def is_count(value: Any) -> bool:
    """Whether a raw value is a positive integer (YAML's true and false are integers to Python, but not counts)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Copy a raw section without its `null` values: writing null asks for the default."""
    return {key: value for key, value in values.items() if value is not None}


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds, be it optional or not; None for keys with plain values."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
