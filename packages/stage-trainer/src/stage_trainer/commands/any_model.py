"""Finding any model that can be measured: ours, or one of another library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stage_trainer.commands.common import MODEL, find_model, say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.evaluation.models import Asked, Embedder

ANY_MODEL = (
    f"{MODEL}; also a folder or a hub's name of open_clip, sentence-transformers or transformers, or "
    "open_clip:ARCHITECTURE/PRETRAINED"
)


def check_any(path: Path) -> None:
    """UserError if a path or name can mean no model, before the first of several takes its time."""
    from stage_trainer import hub
    from stage_trainer.evaluation.foreign_models import OPEN_CLIP

    if not (str(path).startswith(OPEN_CLIP) or hub.is_name(str(path)) or path.exists()):
        raise UserError(f"there is no {path}; expected {ANY_MODEL}")


def open_any(path: Path, asked: Asked) -> Embedder:
    """The model that a path or name means, loaded; its column is called as it was named.

    Raises:
        UserError: there is none, it is damaged, or its library is missing.
    """
    from stage_trainer import hub
    from stage_trainer.evaluation import foreign_models
    from stage_trainer.evaluation.models import Ours

    name = str(path)
    if name.startswith(foreign_models.OPEN_CLIP):
        return foreign_models.load(name, None, "open_clip", asked)
    if hub.is_name(name):
        say(f"there is no {name} here: taking that of the Hugging Face hub …")
    folder = hub.local(name) if hub.is_name(name) else path
    if library := foreign_models.library_of(folder):
        say(f"{name}: a model of {library}, loading …")
        return foreign_models.load(name, folder, library, asked)
    return Ours(find_model(folder)[0], name, asked)
