"""Ranges of the recipe's numbers, by their key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from stage_trainer.errors import UserError
from stage_trainer.recipe.limits import LimitsConfig
from stage_trainer.recipe.schema import Recipe, Stage

LARGEST = 2**53
"""Integers up to here are exact everywhere: in TensorBoard, in JSON, as a float."""


@dataclass(frozen=True)
class Range:
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


ZERO_OR_MORE, ONE_OR_MORE, ABOVE_ZERO = Range(0), Range(1), Range(0, open_low=True)
SHARE = Range(0, 1)
PART = Range(0, 1, open_high=True)
FACTOR = Range(0, 1, open_low=True)

OF_RECIPE = {
    "seed": ZERO_OR_MORE,
    "workers": ZERO_OR_MORE,
    "cache_megabytes": ZERO_OR_MORE,
    "max_pixels": Range(1, 178_956_970),  # Pillow opens no larger ones
    "max_corrupt": SHARE,
    "max_skipped": ONE_OR_MORE,
    "log_every": ONE_OR_MORE,
    **{f"limits.{phase}": ABOVE_ZERO for phase in LimitsConfig.__dataclass_fields__},
    "model.temperature": ABOVE_ZERO,
    "model.override.temperature": ABOVE_ZERO,
    "remote.gigabytes": ABOVE_ZERO,
    "remote.downloads": ONE_OR_MORE,
    "remote.timeout": ABOVE_ZERO,
    "remote.deadline": ABOVE_ZERO,
    "remote.manifest_megabytes": ABOVE_ZERO,
    "remote.retries": ZERO_OR_MORE,
    "optimizer.betas": PART,
    "optimizer.eps": FACTOR,
    "optimizer.weight_decay": SHARE,
    "optimizer.gradient_clipping": ZERO_OR_MORE,
    "optimizer.embedding_lr_scale": ZERO_OR_MORE,
    "optimizer.muon_lr_scale": ABOVE_ZERO,
    "optimizer.muon_momentum": PART,
    "evaluation.every": ZERO_OR_MORE,
    "checkpoint.every": ZERO_OR_MORE,
    "checkpoint.keep": ONE_OR_MORE,
}

OF_STAGE = {
    "steps": ONE_OR_MORE,
    "max_tokens": Range(3),  # the special tokens at both ends, and one between them
    "batch.image_text": ZERO_OR_MORE,
    "batch.text": ZERO_OR_MORE,
    "batch.masked_lm": ZERO_OR_MORE,
    "lr.image": SHARE,
    "lr.text": SHARE,
    "layer_decay.image": FACTOR,
    "layer_decay.text": FACTOR,
    "warmup_steps": ZERO_OR_MORE,
    "min_lr_ratio": SHARE,
    "task_start.image_text": ZERO_OR_MORE,
    "task_start.text": ZERO_OR_MORE,
    "loss.dims": ONE_OR_MORE,
    "loss.weights": ABOVE_ZERO,
    "loss.min_temperature": ABOVE_ZERO,
    "loss.false_negative_margin": Range(-2, 2),
    "masking.share": Range(0, 1, open_low=True, open_high=True),
    "masking.language_exponent": SHARE,
    "augmentation.scale": FACTOR,
    "augmentation.ratio": ABOVE_ZERO,
    "augmentation.color": PART,
    "augmentation.views": ZERO_OR_MORE,
}


def check_ranges(holder: Recipe | Stage, ranges: Mapping[str, Range], here: str) -> None:
    """UserError for the first number out of its range; of a list every number is checked, None is not."""
    for path, expected in ranges.items():
        value: Any = reduce(getattr, path.split("."), holder)
        several = isinstance(value, tuple)
        if not all(one is None or one in expected for one in (value if several else (value,))):
            found, each = (list(value), "each ") if several else (value, "")
            raise UserError(f"{here}: {path} is {found}; expected {each}{expected}")


def check_leaves(recipe: object, where: str) -> None:
    """UserError for a number that is not finite or too large, an empty text, or one that no path can hold."""
    for path, value in _leaves(recipe):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {path} is {value}; expected a finite number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{where}: {path} is a number of {value.bit_length()} bits; expected at most {LARGEST:,}")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{where}: {path} is {value!r}; expected a text without NUL characters")
        if isinstance(value, str) and not _is_unicode(value):
            raise UserError(f"{where}: {path} is {value!r}; expected a text without halves of a surrogate pair")
        if isinstance(value, str) and not value.strip() and ".instructions." not in path:
            raise UserError(f"{where}: {path} is empty; write what is meant, or leave it out")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of all that is neither a mapping nor a list; stages are counted from 1."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree, path == "stages"):
            yield from _leaves(value, f"{path}.{number}")
    else:
        yield path, tree
