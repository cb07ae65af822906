"""The searches of a report: a run's last model on its held-out images, as `stage-trainer search` draws them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from vision_tower import ImageError, load_image

from stage_trainer.data.stateless_rng import key
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import HeldOut, find
from stage_trainer.evaluation.picture import Row, draw, fonts_of, own_rows
from stage_trainer.evaluation.retrieval import Pool, embed
from stage_trainer.pages.runs import Run, StageFolder
from stage_trainer.recipe.limits import MAX_PIXELS

_THUMBNAIL = 128  # pixels


@dataclass(frozen=True)
class Tile:
    """An image found: a data URI, and whether it is the query's own."""

    source: str
    right: bool


@dataclass(frozen=True)
class Search:
    """A query, a note on it, and the images found, nearest first."""

    query: str
    note: str
    found: Sequence[Tile]


@dataclass(frozen=True)
class Gallery:
    """Searches of a run's model; `said` is what was searched, `png` the picture of it."""

    run: str
    said: str
    searches: Sequence[Search]
    png: bytes


def gallery_of(
    run: Run, data: Path | None, most: int, say: Callable[[str], None], *, max_pixels: int = MAX_PIXELS
) -> Gallery:
    """Searches held-out images with captions in as many languages as there are.

    Args:
        data: where the images are; None: where the run was evaluated.
        most: images of a pool that are searched, chosen by a hash.

    Raises:
        UserError: the run has no model for it, or the images are no longer there; the message says what to do.
    """
    stage = _searched(run)
    assert stage.saved is not None
    held_out = [each for each in find(data).sets if each.images] if data else _where_evaluated(stage)
    held_out = [each for each in held_out if each.kind == "image-short"] or held_out
    if not held_out:
        raise UserError(f"{data} has no images with captions; name data that do: --data DATA")
    if damage := stage.saved.damage("model/"):
        raise UserError(f"{stage.saved.path} is damaged: {damage}")
    try:
        pools = [Pool.open(each.directory, max_pixels) for each in held_out]
        pools = [_few(pool, most) for pool in pools]
    except ImageError as error:
        raise UserError(str(error)) from error
    count = sum(len(pool.images) for pool in pools)
    names = ", ".join(f"{each.kind}/{each.directory.name}" for each in held_out)
    said = f"{stage.name}, {stage.saved.path.name}, on {count:,} images of {names}"
    say(f"searching: {run.name}, {said} …")
    model = DualEncoder.from_pretrained(stage.saved.model)
    fonts = fonts_of(data or held_out[0].directory.parent.parent.parent)  # a corpus has fonts
    rows = own_rows(pools, [embed(model, pool) for pool in pools], fonts)
    file = io.BytesIO()
    draw(rows, fonts).save(file, "png")
    return Gallery(run.name, said, [_search(row) for row in rows], file.getvalue())


def _searched(run: Run) -> StageFolder:
    """The last stage whose model has both towers."""
    for stage in reversed(run.stages):
        if stage.saved is not None and stage.both_towers:
            return stage
    raise UserError("it has no checkpoint of two towers")


def _where_evaluated(stage: StageFolder) -> list[HeldOut]:
    pools = {name: pool for name, pool in stage.pools.items() if str(pool.get("kind", "")).startswith("image-")}
    if not pools:
        raise UserError(f"{stage.name} was not evaluated on images; --data DATA says where they are")
    gone = [str(pool.get("folder", name)) for name, pool in pools.items() if not Path(pool.get("folder", "")).is_dir()]
    if gone:
        raise UserError(f"the images that it was evaluated on are not at {', '.join(gone)}; --data DATA says where")
    return [HeldOut(Path(pool["folder"]), pool["kind"], name) for name, pool in pools.items()]


def _few(pool: Pool, most: int) -> Pool:
    """The pool with at most so many of its images, and their texts."""
    if len(pool.images) <= most:
        return pool
    kept = sorted(sorted(range(len(pool.images)), key=lambda number: key("few", number))[:most])
    place = {number: new for new, number in enumerate(kept)}
    texts = {
        language: few
        for language, entries in pool.texts.items()
        if (few := [(place[number], text) for number, text in entries if number in place])
    }
    return replace(pool, images=[pool.images[number] for number in kept], texts=texts)


def _search(row: Row) -> Search:
    query, note, found = row
    return Search(query, note, [Tile(thumbnail(file), right) for file, right in found])


def thumbnail(image: bytes | str | Path) -> str:
    """A small picture of an image file as a data URI.

    Raises:
        ImageError: the file cannot be used.
    """
    tile = load_image(image)
    tile.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return uri_of(tile)


def uri_of(picture: Image.Image) -> str:
    """A picture as a data URI."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "jpeg", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
