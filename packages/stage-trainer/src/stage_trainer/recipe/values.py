"""Numbers of YAML, and how its mappings are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict

STRICT = ConfigDict(extra="forbid", strict=False)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected here, and true or false is none")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
"""Numbers of YAML. `true` is refused, which pydantic would take for 1; 1e5 is accepted as an integer."""

MOST_LANES = 1024


def _lanes(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    if value == "auto" or (number and 1 <= value <= MOST_LANES):  # type: ignore[operator]
        return value
    raise ValueError(f"a whole number from 1 to {MOST_LANES:,} is expected here, or 'auto'")


Lanes = Annotated[int | Literal["auto"], BeforeValidator(_lanes)]
"""A number of lanes (`data.lanes`)."""
