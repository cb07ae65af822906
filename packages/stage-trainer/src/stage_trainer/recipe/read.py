"""Reading a recipe's file, with overrides; every mistake is one sentence that names the key and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from stage_trainer.data.remote import Address, is_remote
from stage_trainer.errors import UserError
from stage_trainer.recipe.rules import check
from stage_trainer.recipe.schema import Recipe, Stage


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A recipe, the dotted paths of the values that its file tags `!ours`, and of all that it states at all."""

    recipe: Recipe
    ours: frozenset[str]
    stated: frozenset[str]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), stage: int | None = None) -> Loaded:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` strings; the key is a dotted path (`optimizer.name`, `stages.1.steps`), or, with `stage`
            given, one of a stage's own fields (`steps`, `batch.text`); the value is YAML.
        stage: the stage, from 1, that bare stage keys of `overrides` mean.

    Raises:
        UserError: a file that is missing or no YAML, an unknown key (with the nearest right one), a wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(p.name for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
        raise UserError(
            f"no recipe {path}; " + (f"beside it there are {near}" if near else "no such folder")
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} should be a mapping with the keys {', '.join(_fields(Recipe))}; found {type(tree).__name__}"
        )
    ours: set[str] = set()
    tree = _strip_marks(tree, "", ours)
    for item in overrides:
        ours.add(_override(tree, item, stage))
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None
    check(recipe, path)
    return Loaded(recipe, frozenset(ours), frozenset(flatten(tree)))


def build_config(cls: type, values: dict[str, Any], where: str) -> Any:
    """A tower's frozen config dataclass from a recipe's mapping, with the recipe's manner of error."""
    unknown = set(values) - set(_fields(cls))
    if unknown:
        raise UserError("; ".join(_unknown(f"{where}.{key}", key, _fields(cls)) for key in sorted(unknown)))
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"batch": {"text": 4}} → {"batch.text": 4}; sequences are leaves unless they hold mappings.

    It is for checkpoints and screens: addresses lose their credentials.
    """
    if isinstance(tree, dict) and tree:
        parts = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple) and tree and isinstance(tree[0], dict):
        parts = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return {prefix: _shown(tree)}
    return {k: v for key, value in parts for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_shown, value))
    return str(Address(value)) if isinstance(value, str) and is_remote(value) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 2e-4 as a number (YAML 1.1 wants 2.0e-4) and knows the tag `!ours`."""


class _Ours:
    def __init__(self, value: Any):
        self.value = value


def _construct_ours(loader: yaml.SafeLoader, node: yaml.Node) -> _Ours:
    if isinstance(node, yaml.ScalarNode):
        plain = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, node.value, (True, False)), node.value)
        return _Ours(loader.construct_object(plain))
    if isinstance(node, yaml.MappingNode):
        return _Ours(loader.construct_mapping(node, deep=True))
    assert isinstance(node, yaml.SequenceNode)
    return _Ours(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("!ours", _construct_ours)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _strip_marks(tree: Any, path: str, ours: set[str]) -> Any:
    if isinstance(tree, _Ours):
        ours.add(path)
        return _strip_marks(tree.value, path, ours)
    if isinstance(tree, dict):
        return {k: _strip_marks(v, f"{path}.{k}" if path else str(k), ours) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_strip_marks(v, f"{path}.{i}", ours) for i, v in enumerate(tree)]
    return tree


def _override(tree: dict[str, Any], item: str, stage: int | None) -> str:
    key, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"{item!r} is not of the form key=value, for example optimizer.name=adamw")
    parts = key.split(".")
    if parts[0] == "stages" and len(parts) > 1 and parts[1].isdigit():
        if parts[1] == "0":
            raise UserError(f"{item!r}: stages are counted from 1")
        parts[1] = str(int(parts[1]) - 1)
    elif stage is not None and parts[0] in _fields(Stage):
        parts = ["stages", str(stage - 1), *parts]
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        try:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        except (IndexError, ValueError, AttributeError) as error:
            raise UserError(f"{item!r}: the recipe has nothing at {'.'.join(parts[: depth + 1])}") from error
    if not isinstance(node, dict):
        raise UserError(f"{item!r}: {'.'.join(parts[:-1])} is not a mapping")
    try:
        node[parts[-1]] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{item!r}: the value is not valid YAML ({error})") from error
    return ".".join(parts)


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _unknown(path: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {path!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _explain(error: Any) -> str:
    """One sentence for one of pydantic's errors; stages are counted from 1, as everywhere that a person sees them."""
    location = list(error["loc"])
    shown = [
        str(p + 1) if i and location[i - 1] == "stages" and isinstance(p, int) else str(p)
        for i, p in enumerate(location)
    ]
    path = ".".join(shown)
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(path, str(location[-1]), _known_at(location[:-1]))
    if error["type"] in ("missing", "missing_argument"):
        return f"{path!r} is missing; add it"
    return f"{path!r}: {error['msg']}; found {error['input']!r}"


def _known_at(location: list[Any]) -> list[str]:
    cls: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        hint = get_type_hints(cls).get(part)
        options = [hint, *get_args(hint)]
        cls = next((o for o in options if dataclasses.is_dataclass(o)), cls)
    return _fields(cls)
