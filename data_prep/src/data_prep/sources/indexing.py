"""Sidecars for existing tars, so that samples can be read by number without copying or changing the tars."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.execute import Execution, Job, Output, Target, run_job
from data_prep.shards import Unusable, content_of, texts_in
from data_prep.shards.format import IMAGE_TYPES, JsonObject
from data_prep.shards.writer import sidecar_row
from data_prep.sources.records import Dropped, file_stat
from data_prep.sources.tars import TarSample, tar_samples


def index_shards(
    shards: list[str],
    out: str,
    *,
    name: str,
    kind: str,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Make the data set `out`/`kind`/`name` of links to tars and sidecars for them; returns the receipt.

    Args:
        shards: uncompressed webdataset tars, or folders of them.

    Raises:
        UserError, ShardError: there are no tars or no usable samples in them, or the disk refuses.
    """
    tars: list[Path] = []
    for path in map(Path, shards):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        tars += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise UserError(f"{', '.join(shards)}: no .tar there (packed ones must be unpacked: they have no offsets)")
    job = Job(
        title="index",
        target=Target(out, name),
        work="data_prep.sources.indexing:index_tar",
        pieces=[{"file": str(tar.resolve()), **file_stat(tar)} for tar in tars],
        options={"kind": kind},
    )
    return run_job(job, execution)


def index_tar(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The work of one unit: the sidecar of one tar."""
    path, kind = Path(piece["file"]), options["kind"]
    rows: list[str] = []
    keys: set[str] = set()
    for sample in tar_samples(path):
        output.came_in()
        if isinstance(sample, Dropped):
            output.drop(sample.reason, sample.where, sample.count)
            continue
        where = f"{path.name}: {sample.name}"
        found = _members(sample, kind)
        if isinstance(found, str):
            output.drop(found, where)
        elif any(
            "\ud800" <= sign <= "\udfff" for sign in sample.name
        ):  # surrogates: tarfile's form of bytes that are not UTF-8
            output.drop("name that is not UTF-8", where)
        elif sample.name in keys:
            output.drop("second sample of one name", where)
        else:
            keys.add(sample.name)
            members, languages = found
            rows.append(sidecar_row(sample.name, members, map(sample.read, members), languages, None))
    if rows:
        output.adopt(kind, path, "".join(row + "\n" for row in rows).encode("utf-8", "replace"), len(rows))


def _members(sample: TarSample, kind: str) -> tuple[dict[str, tuple[int, int]], list[str]] | str:
    """The members that a trainer needs, and the languages; or the reason to drop the sample.

    img2dataset's .json holds metadata instead of captions; then the .txt is used.
    """
    image = next((extension for extension in IMAGE_TYPES if extension in sample.members), None)
    images = [image] if image is not None and kind.startswith("image") else []
    reasons = []
    for texts in ("json", "txt"):
        kept = [*images, *([texts] if texts in sample.members else [])]
        try:
            # Whether the image can be decoded is asked by `validate` and the trainer.
            content = content_of(kind, {name: sample.read(name) if name == texts else b"" for name in kept})
        except Unusable as error:
            reasons.append(error.reason)
            continue
        languages = {text["language"] for _, group in texts_in(kind, content) for text in group}
        return {name: sample.members[name] for name in kept}, sorted(languages)
    return reasons[0] if "json" in sample.members else reasons[-1]
