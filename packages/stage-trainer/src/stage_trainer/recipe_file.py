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
from stage_trainer.recipe import GradientCache, Recipe, Stage


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
    _check(recipe, path)
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


def _check(recipe: Recipe, path: str | Path) -> None:
    """What types cannot say."""
    if recipe.log_every < 1 or recipe.checkpoint.keep < 1:
        raise UserError(f"{path}: 'log_every' and 'checkpoint.keep' should be at least 1")
    remote = recipe.remote
    limit = 1 if remote.gigabytes is None else remote.gigabytes
    if remote.downloads < 1 or remote.retries < 0 or remote.timeout <= 0 or limit <= 0:
        raise UserError(
            f"{path}: 'remote.downloads' should be at least 1, 'retries' at least 0, 'timeout' and 'gigabytes' above 0"
        )
    if not recipe.stages:
        raise UserError(f"{path}: 'stages' is empty; a recipe needs at least one stage")
    for number, stage in enumerate(recipe.stages, 1):
        here = f"{path}: stage {number}"
        if stage.masked:
            _check_masked_lm(recipe, number, here)
        else:
            _check_pairs(recipe, number, here)
        cache = stage.gradient_cache
        if cache == "auto" and stage.masked:
            raise UserError(
                f"{here}: 'gradient_cache: auto' is for stages of pairs; masked-language-model training is told the "
                "tokens of one pass, such as {tokens: 16384}, or nothing"
            )
        if isinstance(cache, GradientCache) and (
            cache.images < 0 or cache.tokens < 0 or not cache.images + cache.tokens
        ):
            raise UserError(
                f"{here}: 'gradient_cache' should give the images and the tokens of one forward pass, such as "
                "{images: 256, tokens: 16384} (0: all of them), or be 'auto'; leave it out for none"
            )
        if stage.carry_optimizer and (number == 1 or recipe.stage(number - 1).masked != stage.masked):
            raise UserError(
                f"{here}: 'carry_optimizer' goes on with the moments of a stage of the same kind before, and there is "
                "none; leave it out"
            )
        if stage.steps < 1 or min(stage.batch.image_text, stage.batch.text, stage.batch.masked_lm) < 0:
            raise UserError(f"{here}: 'steps' should be at least 1 and batch sizes at least 0")
        for task in ("image_text", "text", "masked_lm"):
            if (size := getattr(stage.batch, task)) and not getattr(stage.data, task):
                raise UserError(
                    f"{here}: batch.{task} is {size} but data.{task} names no data; add sources or set it to 0"
                )
        for option in ("bf16", "fp16"):
            if stage.deepspeed.get(option) not in (None, {"enabled": False}):
                raise UserError(
                    f"{here}: deepspeed.{option} would round the temperatures too; set 'precision: bf16' instead, "
                    "which computes in bfloat16 and keeps parameters in float32"
                )
        partition = stage.deepspeed.get("zero_optimization", {})
        if not isinstance(partition, dict):
            raise UserError(f"{here}: deepspeed.zero_optimization should be a mapping such as {{stage: 1}}")
        zero = partition.get("stage", 0)
        if recipe.optimizer.name == "muon" and zero:
            raise UserError(
                f"{here}: Muon needs whole matrices, and ZeRO {zero} cuts them up; "
                "set zero_optimization.stage to 0 or optimizer.name to adamw"
            )


def _check_pairs(recipe: Recipe, number: int, here: str) -> None:
    """A stage that learns from pairs."""
    stage = recipe.stage(number)
    if recipe.model.vision is None:
        raise UserError(f"{here} trains both towers, and 'model.vision' is missing; add it")
    for name in ("resolution", "patch_dropout"):
        starts = [start for start, _ in getattr(stage, name)]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(
                f"{here}: {name!r} should be [[0, …], [later step, …], …] with rising steps; found {starts}"
            )
    if not all(0 <= rate < 1 for _, rate in stage.patch_dropout):
        raise UserError(f"{here}: 'patch_dropout' rates should be at least 0 and below 1; found {stage.patch_dropout}")
    for task in ("image_text", "text"):
        if any(source.rate <= 0 for source in getattr(stage.data, task)):
            raise UserError(f"{here}: every rate of data.{task} should be above 0; leave out what is not wanted")
    if not stage.batch.image_text and not stage.batch.text:
        raise UserError(f"{here}: all batch sizes are 0; nothing would be trained")
    if stage.loss.kind == "unified" and not (stage.batch.image_text and stage.batch.text):
        raise UserError(f"{here}: a unified loss is over both tasks; give 'batch' an image_text and a text size")


def _check_masked_lm(recipe: Recipe, number: int, here: str) -> None:
    """A stage of masked-language-model training."""
    stage = recipe.stage(number)
    for task in ("image_text", "text"):
        if getattr(stage.batch, task):
            raise UserError(
                f"{here}: batch.masked_lm and batch.{task} are both set; masked-language-model training is a stage of "
                f"its own, so set batch.{task} to 0 or move one of them to another stage"
            )
    if number > 1 and not recipe.stage(number - 1).masked:
        raise UserError(
            f"{here}: masked-language-model training follows a stage that trains embeddings, whose image tower and "
            "adapters it would lose; put it first"
        )
    if stage.trainable.text != "all":
        raise UserError(
            f"{here}: trainable.text is {stage.trainable.text!r}; masked-language-model training is for all weights of "
            "the text tower, so leave it out"
        )
    if not 0 < stage.masking.share < 1 or not 0 <= stage.masking.language_exponent <= 1:
        raise UserError(
            f"{here}: masking.share should lie between 0 and 1 and masking.language_exponent from 0 (each language as "
            f"often as another) to 1 (by their texts); found {stage.masking.share} and "
            f"{stage.masking.language_exponent}"
        )
