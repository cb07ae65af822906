"""Overrides of a recipe, `key=value`: sets them, and suggests the nearest key for an unknown one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from text_tower.config import TextTowerConfig
from vision_tower.config import VisionTowerConfig

from stage_trainer.errors import UserError
from stage_trainer.recipe import deepspeed
from stage_trainer.recipe.schema import ModelConfig, Recipe, Stage
from stage_trainer.recipe.tower_rules import fields_of
from stage_trainer.recipe.yaml_text import Ours, parse

_FREE = {
    (ModelConfig, "text"): TextTowerConfig,
    (ModelConfig, "vision"): VisionTowerConfig,
    (Stage, "deepspeed"): deepspeed.Options,
}
"""The schema of mappings that the recipe's own schema leaves open."""


def apply(tree: dict[str, Any], item: str, stage: int | None) -> str:
    """Sets a value in a recipe's tree; returns its dotted path, with stages counted from 0, as in the tree.

    Args:
        item: `key=value`, see `read.load`.
        stage: the stage, from 1, to which bare stage keys refer.

    Raises:
        UserError: not key=value, an unknown key (with the nearest right one), or a value that is not YAML.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"override {short(item)} is not of the form key=value, for example optimizer.name=adamw")
    typed = key.split(".")
    parts = _place(typed, item, stage)
    offset = len(typed) - len(parts)  # a bare stage key was typed without "stages.N"
    node: Any = tree
    for depth, part in enumerate(parts):
        known = known_at(parts[:depth])
        if not isinstance(node, list) and known and part not in known:
            raise UserError(_unknown(item, typed[: depth + offset], part, known))
        if depth == len(parts) - 1:
            break
        if isinstance(node, list) and not (part.isascii() and part.isdecimal() and int(part[:9]) < len(node)):
            where = ".".join(typed[: depth + offset])
            raise UserError(
                f"override {short(item)}: {where} has {len(node)} entries and none numbered {typed[depth + offset]!r}"
            )
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[int(part)] if isinstance(node, list) else node[part]
        if not isinstance(node, dict | list):
            raise UserError(
                f"override {short(item)}: {'.'.join(typed[: depth + offset + 1])} is {short(node)}, which has no keys"
            )
    if not isinstance(node, dict):
        raise UserError(
            f"override {short(item)}: {'.'.join(typed[:-1])} is a list; set it as a whole, or a key of one "
            "of its entries"
        )
    value = parse(text, f"override {short(item)}: the value")
    node[parts[-1]] = value.value if isinstance(value, Ours) else value
    return ".".join(parts)


def _place(typed: list[str], item: str, stage: int | None) -> list[str]:
    """The parts of a key as in the tree."""
    first = typed[0]
    if first == "stages" and len(typed) > 1:
        number = typed[1]
        if not (number.isascii() and number.isdecimal()) or not int(number[:9]) > 0:
            raise UserError(
                f"override {short(item)}: stages are counted from 1, as in stages.1.steps; found {number!r}"
            )
        return ["stages", str(int(number[:9]) - 1), *typed[2:]]
    if first in fields_of(Stage):
        if stage is None:
            raise UserError(
                f"override {short(item)}: {first!r} is a stage's; write stages.1.{first}, or choose a stage "
                "with --stage"
            )
        return ["stages", str(stage - 1), *typed]
    if first not in fields_of(Recipe):
        raise UserError(_unknown(item, [], first, [*fields_of(Recipe), *fields_of(Stage)]))
    return typed


def _unknown(item: str, before: list[str], part: str, known: Sequence[str]) -> str:
    shown = ".".join([*before, part])
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
    meant = [".".join([*before, name]) for name in near] or ([] if before else _deeper(part))
    if meant:
        return f"override {short(item)}: the recipe has no key {shown!r}; did you mean {' or '.join(map(repr, meant))}?"
    where = f"at {'.'.join(before)} there are" if before else "there are"
    return f"override {short(item)}: the recipe has no key {shown!r}; {where} {', '.join(known)}"


def _deeper(part: str) -> list[str]:
    """Places one level down that have a key of that name."""
    return [
        f"{name}.{part}"
        for cls in (Recipe, Stage)
        for name in fields_of(cls)
        if name != "stages" and part in _fields(_inside(cls, name))
    ]


def known_at(location: Sequence[Any]) -> list[str]:
    """The keys that the mapping at a place of the recipe can have; empty if any key is allowed."""
    place: Any = Recipe
    for part in location:
        if not isinstance(part, int) and not str(part).isdecimal():
            place = _inside(place, str(part))
    return _fields(place)


def short(value: object) -> str:
    """The `repr` of a value, shortened if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]} …"


def _fields(place: Any) -> list[str]:
    return fields_of(place) if dataclasses.is_dataclass(place) else []  # type: ignore[arg-type]


def _inside(place: Any, key: str) -> Any:
    """The schema of the value under a key: a dataclass, DeepSpeed's options (see `deepspeed.check`), or None."""
    if (place, key) in _FREE:
        return _FREE[place, key]
    if not dataclasses.is_dataclass(place):
        return None
    return _dataclass_in(get_type_hints(place).get(key))


def _dataclass_in(hint: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((found for option in get_args(hint) if (found := _dataclass_in(option))), None)
