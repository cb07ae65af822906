"""Importing: runs a source as a job and turns its records into samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data_prep.execute import Execution, Job, Output, Target, run_job, say
from data_prep.image_rule import ImageRule
from data_prep.images import ImageRefused, StoredImage, store_image
from data_prep.languages import LANGUAGES, house_language
from data_prep.samples import Text, captions_json, languages_of, texts_json
from data_prep.shards import Unusable, content_of
from data_prep.shards.content import encodes, is_language
from data_prep.shards.format import IMAGE_TRIPLETS, JsonObject
from data_prep.sources import EVALSETS, SOURCES
from data_prep.sources.records import Dropped, ImageRecord, Noted, Source, TextRecord

# As pandas, R, MySQL and Python write a value that is not there; "None" may be an answer, too.
_NOTHING = {"NULL", "null", "nan", "NaN", "None", "N/A", "#N/A", "<NA>", "NA", "\\N"}
_MAX_BYTES = 256 * 2**20  # of an image file; no photograph or page is larger


def import_source(
    source: Source,
    target: Target,
    *,
    title: str,
    evalset: bool = False,
    image: ImageRule | None = None,
    execution: Execution | None = None,
    log: Callable[[str], None] = say,
) -> JsonObject | None:
    """Import a source; returns the receipt, None if other array tasks have units left.

    Args:
        source: an importer with its values; title: its name in `SOURCES`, or with `evalset` in `EVALSETS`.
        image: how images are stored, instead of the source's own rule.

    Raises:
        UserError, ShardError: the input is not there or not of its form, nothing came out, or the disk refuses.
    """
    job = Job(
        title=f"{'evalset' if evalset else 'import'} {title}",
        target=target,
        work="data_prep.sources.importing:import_piece",
        pieces=list(source.pieces()),
        options={
            "source": title,
            "evalset": evalset,
            "values": json.loads(json.dumps(asdict(source))),  # type: ignore[call-overload]
            "image": asdict(image or source.image) if source.image else None,
            "name": target.name,
        },
    )
    return run_job(job, execution, log=log)


def import_piece(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The work of one unit: everything that the source finds in the piece."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options["values"].items()}
    source: Source = (EVALSETS if options["evalset"] else SOURCES)[options["source"]](**values)
    rule = ImageRule(**options["image"]) if options["image"] else None
    name = options["name"]
    for found in source.read(piece):
        if isinstance(found, Noted):
            output.note(found.name, found.count)
            continue
        output.came_in(found.count if isinstance(found, Dropped) else getattr(found, "rows", 1))
        if isinstance(found, Dropped):
            output.drop(found.reason, found.where, found.count, content=found.content, source=found.source)
        elif isinstance(found, TextRecord):
            _write_texts(found, name, output)
        else:
            assert rule is not None
            _write_image(found, rule, name, output)


def _write_texts(record: TextRecord, name: str, output: Output) -> None:
    query, target = _ours(record.query, output), _ours(record.target, output)
    negatives = None if record.negatives is None else [_ours(negative, output) for negative in record.negatives]
    kind = "text-pairs" if record.negatives is None else "text-triplets"
    item = f"{name}/{output.next_key(kind)}"
    content = texts_json(query, target, negatives, source=name, item=item, score=record.score, scores=record.scores)
    texts = [text for group in (query, target, *(negatives or ())) for text in group]
    _write(kind, {"json": content}, texts, record.where, output)


def _write_image(record: ImageRecord, rule: ImageRule, name: str, output: Output) -> None:
    try:
        stored = _stored(record.image, rule)
    except ImageRefused as error:
        texts = [text.text for text in (*record.short, *record.long)]
        output.drop(str(error), record.where, content=texts)
        return
    negatives = _negatives(record, stored, rule, output)
    if encoded := sum(image.encoded_anew for image in (stored, *negatives)):
        output.note("images encoded anew", encoded)
    members = {stored.extension: stored.data}
    members |= {f"negative-{number}.{image.extension}": image.data for number, image in enumerate(negatives)}
    by_kind = {"image-short": record.short, "image-long": record.long}
    for kind, found in ({IMAGE_TRIPLETS: [*record.short, *record.long]} if negatives else by_kind).items():
        captions = _ours(found, output)
        if captions:
            content = captions_json(captions, source=name, item=f"{name}/{record.item}")
            _write(kind, {**members, "json": content}, captions, record.where, output)


def _negatives(record: ImageRecord, image: StoredImage, rule: ImageRule, output: Output) -> list[StoredImage]:
    """The first `record.triplet` of a record's negative images that can be stored; none if there are fewer."""
    found: dict[bytes, StoredImage] = {}
    for negative in record.negatives:
        if len(found) == record.triplet:
            break
        try:
            stored = _stored(negative, rule)
        except ImageRefused as error:
            output.note(f"negative images left out: {error}")
            continue
        if stored.data == image.data or stored.data in found:
            output.note("negative images left out: equal to the positive, or there twice")
        else:
            found[stored.data] = stored
    if (record.negatives or record.left_out) and len(found) < record.triplet:
        output.note(f"with fewer than {record.triplet} negative images (--negatives), as pairs")
        return []
    return list(found.values())


def _ours(texts: Sequence[Text], output: Output) -> list[Text]:
    """The texts, with their languages as the house calls them; others than its thirty are counted."""
    ours = [replace(text, language=house_language(text.language)) for text in texts]
    if strangers := sum(text.language not in LANGUAGES and text.language != "und" for text in ours):
        output.note("texts in a language that is none of the thirty", strangers)
    if nothing := sum(text.text.strip() in _NOTHING for text in ours):
        output.note("texts that may stand for a missing value (NULL, nan, None); they are kept", nothing)
    return ours


def _write(kind: str, members: dict[str, bytes], texts: Sequence[Text], where: str, output: Output) -> None:
    """Writes a sample, unless those who read it would refuse it."""
    languages = languages_of(texts)
    try:  # half a character would be replaced in the JSON, so it is looked for here
        if not all(map(is_language, languages)):
            raise Unusable("language that cannot be one (empty, with a slash or control characters)")
        if not all(encodes(text.text) and encodes(text.origin) for text in texts):
            raise Unusable("text with half a character (a lone surrogate)")
        content_of(kind, members)
    except Unusable as error:
        output.drop(error.reason, where, content=[text.text for text in texts])
    else:
        output.write(kind, members, languages=languages)


def _stored(image: bytes | Path, rule: ImageRule) -> StoredImage:
    if isinstance(image, bytes) and len(image) > _MAX_BYTES:
        raise ImageRefused("image file too large")
    if isinstance(image, Path):
        try:
            if not image.is_file():
                raise ImageRefused("no such image file")
            if image.stat().st_size > _MAX_BYTES:
                raise ImageRefused("image file too large")
            image = image.read_bytes()
        except OSError as error:
            raise ImageRefused("image file cannot be read") from error
    return store_image(image, rule)
