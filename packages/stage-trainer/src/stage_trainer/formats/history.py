"""How a model came to be, as its checkpoint and the run around it tell: for the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stage_trainer import hub
from stage_trainer.checkpoint.load import Saved, all_saved, at
from stage_trainer.errors import UserError
from stage_trainer.evaluation.report import EVALUATION
from stage_trainer.evaluation.tables import Pools
from stage_trainer.files import read_json

NON_COMMERCIAL = "cc-by-nc-4.0"
_LICENCES = {
    r"(^|/)jinaai/jina-(clip-v1|embeddings-v2-|bert-)": "apache-2.0",
    r"(^|/)jinaai/": NON_COMMERCIAL,
    r"(^|/)xlm-roberta-(base|large)$": "mit",
    r"^timm/eva02_|QuanSun/EVA-CLIP|(^|/)EVA02_(CLIP_)?[BLE]_[^/]*\.pt$": "mit",
}
"""Of published weights, by their hub name or file name."""
_WEIGHTS = ("model.weights", "model.text_weights", "model.vision_weights")
_LARGEST = 2**20


@dataclass(frozen=True)
class TrainedStage:
    """A stage that the model went through: its name, and what its last checkpoint's state.json holds."""

    name: str
    state: Mapping[str, Any]

    def setting(self, key: str) -> Any:
        """A setting of the recipe by its flat name, such as "stage.max_tokens"; None if it is not known."""
        return self.state.get("settings", {}).get(key)

    def sources(self) -> list[str]:
        """The data sets that it drew from."""
        return [name for name in self.state.get("data", {}) if not name.startswith("the model of ")]


@dataclass(frozen=True)
class History:
    """Attributes:
    stages: oldest first; empty if the model is not from a checkpoint.
    weights: those that training started from, each with its licence (None: not known); of a folder only the end of
        its path.
    bases: those of them that are named as on a hub.
    pools: figures of exactly this model, if it has been evaluated.
    """

    stages: tuple[TrainedStage, ...] = ()
    weights: Mapping[str, str | None] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    pools: Pools = field(default_factory=dict)

    @property
    def licence(self) -> str | None:
        """The licence that follows for this model; None if the weights that it started from leave it open."""
        found = set(self.weights.values())
        return NON_COMMERCIAL if NON_COMMERCIAL in found else None

    @property
    def languages(self) -> list[str]:
        """Those in which the model was measured."""
        found = {language for pool in self.pools.values() for language in pool.get("texts", {})}
        for pool in self.pools.values():
            found |= {language for by_language in pool.get("ndcg_at_10", {}).values() for language in by_language}
        return sorted(language for language in found if re.fullmatch(r"[a-z]{2,3}", language))


def of(model: Path, checkpoint: Path | None, named: str = "") -> History:
    """The history of a model's directory, and of the checkpoint that it is in; `named` is what the user calls it."""
    if checkpoint is None and hub.is_name(named):
        return History(weights={named: licence_of(named) or licence_of(str(model))}, bases=(named,))
    if checkpoint is None:  # exported before: what its own card says of the licence stays true
        licence = licence_of(str(model))
        return History(weights={_shown(str(model)): licence} if licence else {})
    stages = _stages(checkpoint)
    begun = list(dict.fromkeys(str(name) for key in _WEIGHTS if (name := stages[0].setting(key))))
    weights = {_shown(name): licence_of(name) for name in begun}
    return History(tuple(stages), weights, tuple(filter(hub.is_name, begun)), _figures(checkpoint))


def _shown(weights: str) -> str:
    """A name for others: what folders someone's machine has is nobody's business."""
    return weights if hub.is_name(weights) else "/".join(Path(weights).parts[-2:]).lstrip("/")


def _stages(checkpoint: Path) -> list[TrainedStage]:
    """The checkpoint's stage, after those of its run that led to it."""
    own = TrainedStage(checkpoint.parent.name, at(checkpoint).state())
    found = [own]
    number = int(m[1]) if (m := re.fullmatch(r"stage(\d{1,4})", own.name)) else 1
    for before in range(number - 1, 0, -1):
        digest = found[0].state.get("data", {}).get(f"the model of stage {before}")
        former = _last(checkpoint.parent.parent / f"stage{before}", digest)
        if former is None:
            break
        found.insert(0, former)
    return found


def _last(directory: Path, digest: str | None) -> TrainedStage | None:
    """The stage in a directory, if its newest checkpoint holds the model of that digest."""
    saved: list[Saved] = all_saved(directory)
    try:
        if not saved or digest is None or saved[-1].model_digest() != digest:
            return None
        return TrainedStage(directory.name, saved[-1].state())
    except UserError:  # a damaged state.json tells nothing
        return None


def _figures(checkpoint: Path) -> Pools:
    """What `stage-trainer evaluate` found of this very checkpoint; empty if it was not evaluated."""
    path = checkpoint.parent / EVALUATION
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the stage again, or move it away") from error
    return {n: of for n, of in found.items() if isinstance(of, dict) and of.get("checkpoint") == checkpoint.name}  # type: ignore[misc]


def licence_of(weights: str) -> str | None:
    """The licence of weights to start from: a published name's, or what a folder says of itself.

    Args:
        weights: a hub name, a file, or a directory (or `text/` or `vision/` in one that was exported).
    """
    for pattern, licence in _LICENCES.items():
        if re.search(pattern, weights, re.IGNORECASE):
            return licence
    folder = Path(weights)
    for place in (folder, folder.parent) if folder.is_dir() else ():
        if stated := _stated(place / "README.md"):
            return stated
        # Published directories name their code or their own hub name there.
        if '"jinaai/' in (config := _text(place / "config.json")):
            return "apache-2.0" if '"jinaai/jina-bert-' in config else NON_COMMERCIAL
    return None


def _stated(card: Path) -> str | None:
    """The `license` at the head of a model card."""
    head = re.match(r"---\n(.*?)\n---\n", _text(card), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, RecursionError):
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) and re.fullmatch(r"[A-Za-z0-9.\-]{1,60}", licence) else None


def _text(file: Path) -> str:
    """A small text file; empty if there is none."""
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
