"""Numbers of YAML, and how its mappings are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict

STRICT = ConfigDict(extra="forbid", strict=False)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected here, and true or false is none")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
"""Numbers of YAML. `true` is refused, which pydantic would take for 1; 1e5 is accepted as an integer."""
