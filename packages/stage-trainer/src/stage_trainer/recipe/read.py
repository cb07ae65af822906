"""Reads a recipe's file, with overrides; every mistake is one sentence that names the key and the remedy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stage_trainer.errors import UserError
from stage_trainer.recipe.address import Address, is_remote
from stage_trainer.recipe.overrides import apply, known_at, short
from stage_trainer.recipe.rules import check
from stage_trainer.recipe.schema import GradientCache, Recipe
from stage_trainer.recipe.tower_rules import unknown_key
from stage_trainer.recipe.yaml_text import LONGEST, Ours, parse


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A recipe, the dotted paths of the values that its file tags `!ours`, and those of all values that it states."""

    recipe: Recipe
    ours: frozenset[str]
    stated: frozenset[str]


def load(path: str | Path, overrides: Sequence[str] = (), stage: int | None = None, *, ranks: int = 1) -> Loaded:
    """Reads and checks a recipe, without importing torch, so that a mistake is reported at once.

    Args:
        path: the YAML file.
        overrides: `key=value` strings; the key is a dotted path (`optimizer.name`, `stages.1.steps`), or, with `stage`
            given, one of a stage's own fields (`steps`, `batch.text`); the value is YAML.
        stage: the stage to run, from 1; bare stage keys of `overrides` refer to it.
        ranks: processes that will share a batch.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (with the nearest right one), a type is wrong, or a
            rule is violated (`recipe.rules`).
    """
    tree = parse(_text(Path(path)), str(path))
    if not isinstance(tree, dict):
        keys = ", ".join(f.name for f in dataclasses.fields(Recipe))
        raise UserError(f"{path} should be a mapping with the keys {keys}; found {type(tree).__name__}")
    ours: set[str] = set()
    tree = _strip_marks(tree, "", ours)
    overridden = {apply(tree, item, stage): item for item in overrides}
    ours |= set(overridden)
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise UserError(_explain(error, str(path), overridden)) from None
    check(recipe, f"{path} with overrides" if overrides else str(path), stage=stage, ranks=ranks)
    return Loaded(recipe, frozenset(ours), frozenset(flatten(tree)))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise UserError(f"{path} has more than {LONGEST:,} bytes; a recipe has some thousand")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(
            f"no recipe {path}; " + (f"beside it there are {near}" if near else "no such folder")
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#x}); save it so"
        ) from None


def flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    """{"batch": {"text": 4}} → {"batch.text": 4}; sequences are leaves unless they hold mappings.

    For checkpoints and screens: credentials are removed from addresses.
    """
    if isinstance(tree, dict) and tree:
        parts = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple) and tree and isinstance(tree[0], dict):
        parts = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return {prefix: _shown(tree)}
    return {k: v for key, value in parts for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value)(map(_shown, value))
    return str(Address(value)) if isinstance(value, str) and is_remote(value) else value


def _strip_marks(tree: object, path: str, ours: set[str]) -> Any:
    if isinstance(tree, Ours):
        ours.add(path)
        return _strip_marks(tree.value, path, ours)
    if isinstance(tree, dict):
        return {k: _strip_marks(v, f"{path}.{k}" if path else str(k), ours) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_strip_marks(v, f"{path}.{i}", ours) for i, v in enumerate(tree)]
    return tree


_MOST = 50
"""Faults that are shown at once."""


def _explain(error: ValidationError, file: str, overridden: dict[str, str]) -> str:
    """All faults, each with the file or the override that it is from."""
    faults: dict[str, list[str]] = {}
    for fault in error.errors()[:_MOST]:
        if fault["type"] == "literal_error" and isinstance(fault["input"], dict):
            continue  # of "a mapping or the word auto" the mapping was meant, whose own fault is another one
        location = [p for p in fault["loc"] if p != GradientCache.__name__ and not str(p).startswith("literal[")]
        place = ".".join(map(str, location))
        source = next(
            (f"override {short(item)}" for key, item in overridden.items() if f"{place}.".startswith(f"{key}.")), file
        )
        told = faults.setdefault(source, [])
        if (text := _sentence(fault, location)) not in told:
            told.append(text)
    more = error.error_count() - _MOST
    return "; ".join(f"{source}: {'; '.join(told)}" for source, told in faults.items()) + (
        f"; and {more:,} more" if more > 0 else ""
    )


def _sentence(fault: Any, location: list[str | int]) -> str:
    """Stages are counted from 1, as everywhere in messages."""
    shown = [
        str(p + 1) if i and location[i - 1] == "stages" and isinstance(p, int) else str(p)
        for i, p in enumerate(location)
    ]
    path = ".".join(shown)
    if fault["type"] == "unexpected_keyword_argument":
        return unknown_key(path, str(location[-1]), known_at(location[:-1]))
    if fault["type"] in ("missing", "missing_argument"):
        return f"{path!r} is missing; add it"
    expected = fault["msg"].removeprefix("Value error, ").replace("tuple", "list")
    expected = re.sub(r"dictionary( or an? instance of \w+)?", "mapping", expected)  # YAML's terms
    return f"{path!r}: {expected}; found {short(fault['input'])}"
