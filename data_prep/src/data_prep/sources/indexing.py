"""Sidecars for existing tars, so that samples can be read by number without copying or changing the tars."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.execute import Execution, Job, Output, Target, run_job
from data_prep.images import ImageRefused, check_stored
from data_prep.names import is_hidden
from data_prep.shards import Row, Unusable, content_of, texts_in
from data_prep.shards.content import with_named_captions
from data_prep.shards.format import IMAGE_TYPES, JsonObject
from data_prep.shards.sidecar import key_fault, row_of
from data_prep.sources.records import Dropped, Noted, file_stat
from data_prep.sources.tars import TarSample, tar_samples

_SAMPLES_PER_SHARD = 1000
"""Tars are not cut. But it is part of every job's identity, and indexes that there are have this number."""


@dataclass(frozen=True)
class IndexRule:
    """What is taken from tars. Samples that training would replace or refuse are dropped.

    kind: one of `KINDS`. caption_keys: fields of the .json that hold the captions, as `named_texts` reads them; without
        them a .json of the format counts, else the .txt.
    max_pixels: images of more are dropped; a recipe's `max_pixels` has the same default.
    decode: try every image; otherwise its header alone is read.
    """

    kind: str = "image-short"
    caption_keys: tuple[str, ...] = ()
    max_pixels: int = 50_000_000
    decode: bool = True

    def __post_init__(self) -> None:
        if self.caption_keys and not self.kind.startswith("image"):
            raise UserError(f"--caption-key: {self.kind} has no captions")
        if not all(key.strip() and key.isprintable() for key in self.caption_keys):
            raise UserError(f"--caption-key {','.join(self.caption_keys)!r}: expected names of fields, with commas")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels {self.max_pixels}: expected at least 1")


def index_shards(
    shards: list[str], out: str, *, name: str, rule: IndexRule, execution: Execution | None = None
) -> JsonObject | None:
    """Make the data set `out`/KIND/`name` of links to tars and sidecars for them; returns the receipt.

    Args:
        shards: uncompressed webdataset tars, or folders of them.

    Raises:
        UserError, ShardError: there are no tars or no usable samples in them, or the disk refuses.
    """
    tars: list[Path] = []
    for path in map(Path, shards):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        inside = sorted(tar for tar in path.glob("*.tar") if not is_hidden(tar.name)) if path.is_dir() else [path]
        tars += [tar.resolve() for tar in inside]
    if not tars:
        raise UserError(f"{', '.join(shards)}: no .tar there (packed ones must be unpacked: they have no offsets)")
    job = Job(
        title="index",
        target=Target(out, name, _SAMPLES_PER_SHARD),
        work="data_prep.sources.indexing:index_tar",
        pieces=[{"file": str(tar), **file_stat(tar)} for tar in dict.fromkeys(tars)],
        options=asdict(rule),
    )
    return run_job(job, execution)


def index_tar(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The work of one unit: the sidecar of one tar."""
    path, rule = Path(piece["file"]), IndexRule(**{**options, "caption_keys": tuple(options["caption_keys"])})
    rows: list[Row] = []
    for sample in tar_samples(path):
        if isinstance(sample, Noted):
            output.note(sample.name, sample.count)
            continue
        output.came_in(sample.count if isinstance(sample, Dropped) else 1)
        if isinstance(sample, Dropped):
            output.drop(sample.reason, sample.where, sample.count, content=sample.content)
            continue
        try:
            rows.append(_row(sample, rule))
        except Unusable as error:
            output.drop(error.reason, f"{path.name}: {sample.name}")
    if rows:
        output.adopt(rule.kind, path, rows, rule.caption_keys)


def _row(sample: TarSample, rule: IndexRule) -> Row:
    """The row of the sidecar: the members that a trainer needs, and the languages. Unusable if it must be dropped.

    img2dataset's .json holds metadata instead of captions; then the .txt is used.
    """
    if fault := key_fault(sample.name):  # tarfile has bytes that are not UTF-8 as half characters
        raise Unusable(fault)
    image = next((extension for extension in IMAGE_TYPES if extension in sample.members), None)
    images = {image: sample.read(image)} if image is not None and rule.kind.startswith("image") else {}
    reasons = []
    for text in ("json",) if rule.caption_keys else ("json", "txt"):
        data = {**images, **({text: sample.read(text)} if text in sample.members else {})}
        read = with_named_captions(rule.kind, data, rule.caption_keys) if rule.caption_keys else data
        try:
            content = content_of(rule.kind, read)
        except Unusable as error:
            reasons.append(error)
            continue
        try:
            for picture in images.values():
                check_stored(picture, max_pixels=rule.max_pixels, decode=rule.decode)
        except ImageRefused as error:
            raise Unusable(str(error)) from error
        languages = {text["language"] for _, group in texts_in(rule.kind, content) for text in group}
        places = {name: sample.members[name] for name in data}
        return row_of(sample.name, places, data, languages=sorted(languages), tokens=None, shard="")
    raise reasons[0] if "json" in sample.members else reasons[-1]
