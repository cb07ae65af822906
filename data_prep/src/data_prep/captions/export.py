"""From the ledger to a data set of images with long captions."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.captions.images import ImageReader, image_of, place_of
from data_prep.captions.ledger import RequestLedger
from data_prep.curation.tokens import TokenCounter
from data_prep.errors import UserError
from data_prep.execute.dropped import NAME, DroppedList
from data_prep.samples import Text, compact_json
from data_prep.shards import Dataset, DatasetWriter, ShardError
from data_prep.shards.format import SHARD_SAMPLES, parse_json

# The images one after another (CROSS JOIN keeps the order), or all captions would be sorted on the disk.
_ACCEPTED = (
    "SELECT image.sha256, image.dataset, image.number, request.id, request.language, request.caption, recipe.model, "
    "recipe.prompt_version, prompt.sha256 AS prompt_sha256, attempt.model AS served_model, attempt.fingerprint, "
    "attempt.prompt_tokens, attempt.completion_tokens FROM image CROSS JOIN request ON request.image = image.id "
    "JOIN recipe ON recipe.id = request.recipe "
    "JOIN prompt ON prompt.version = recipe.prompt_version AND prompt.language = request.language "
    "JOIN attempt ON attempt.id = (SELECT max(id) FROM attempt WHERE request = place) "
    "WHERE +request.state = 'accepted' ORDER BY image.id, place"
)
_SYNTHESIS = (
    "model",
    "served_model",
    "fingerprint",
    "prompt_tokens",
    "completion_tokens",
    "prompt_version",
    "prompt_sha256",
)


@dataclass
class Exported:
    """What was written. captions: how many, by language; left_out: images that cannot be used."""

    captions: Counter[str] = field(default_factory=Counter)
    left_out: int = 0


def export(
    ledger: RequestLedger,
    out: str | Path,
    *,
    source: str,
    tokenizer: TokenCounter | None = None,
    samples_per_shard: int = SHARD_SAMPLES,
    tick: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the images with their accepted captions.

    A sample is an image with its captions in all languages, `{"captions", "source", "item", "synthesis"}`; `synthesis`
    has for each caption, in the same order, the request's id, the model that was asked and the one that answered, its
    fingerprint, the tokens that it counted, prompt version and hash. Origin is "synthetic:MODEL:PROMPTVERSION". The
    item is that of the image's source sample, so that its short and long captions are one item. An image that cannot be
    read, or is no longer the one that was described, is left out and listed in `out`/dropped.jsonl; its captions stay.

    Raises:
        UserError: no caption is accepted yet, or no image can be used.
        ShardError: `out` exists, or the disk refuses.
    """
    done, first = Exported(), ""
    if ledger.db.execute("SELECT 1 FROM request WHERE state = 'accepted' LIMIT 1").fetchone() is None:
        raise UserError(f"{ledger.path}: no caption was accepted yet; see `data-prep captions status {ledger.path}`")
    reader = ImageReader()
    with DatasetWriter(
        out,
        kind="image-long",
        source=source,
        samples_per_shard=samples_per_shard,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
    ) as writer:
        dropped = DroppedList(writer.unpublished / NAME, str(ledger.path))
        rows = ledger.db.execute(_ACCEPTED)
        for sha256, group in itertools.groupby(rows, key=lambda row: row["sha256"]):
            captions = list(group)
            try:
                members, item = _source(reader, captions[0])
            except (UserError, ShardError) as error:
                place = place_of(captions[0]["dataset"], captions[0]["number"])
                dropped.add(str(error), place, content=[row["caption"] for row in captions])
                done.left_out, first = done.left_out + 1, first or str(error)
                tick()
                continue
            image = image_of(members)[1]
            extension = next(name for name, data in members.items() if data is image)
            synthesis = [{"request": row["id"], **{name: row[name] for name in _SYNTHESIS}} for row in captions]
            content = {"captions": list(map(_text, captions)), "source": source, "item": item, "synthesis": synthesis}
            writer.write(
                sha256[:32],
                {extension: image, "json": compact_json(content)},
                languages=sorted({row["language"] for row in captions}),
                tokens=max(tokenizer.counts([row["caption"] for row in captions])) if tokenizer else None,
            )
            done.captions.update(row["language"] for row in captions)
            tick()
        if not done.captions:
            raise UserError(f"none of {done.left_out} images can be used, the first: {first}")
        dropped.finish()
    return done


def _source(reader: ImageReader, row: sqlite3.Row) -> tuple[dict[str, bytes], str]:
    """The members and the item of the sample that an image is from; raises as `ImageReader.members` does."""
    members = reader.members(row["dataset"], row["number"], row["sha256"])
    return members, _item(reader.dataset(row["dataset"]), row["number"], members)


def _item(dataset: Dataset, number: int, members: dict[str, bytes]) -> str:
    """The identity that the image's own sample gives, else that of its place."""
    try:
        item = parse_json(members["json"])["item"]
    except (KeyError, ValueError, TypeError):
        item = None
    return item if isinstance(item, str) and item else dataset.row(number).item


def _text(row: sqlite3.Row) -> dict[str, str]:
    return Text(row["caption"], row["language"], "long", f"synthetic:{row['model']}:{row['prompt_version']}").record()
