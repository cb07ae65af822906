"""Folders written by img2dataset, and subsets of them that DataComp and DFN publish as lists of uids."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.content import is_blank, named_texts
from data_prep.shards.format import IMAGE_TYPES, JsonObject, parse_json
from data_prep.sources.records import Dropped, Found, ImageRecord, Noted, argument, file_stat, option
from data_prep.sources.tars import TarSample, tar_samples

_CAPTION = "caption"
_FAILED = ("failed_to_download", "failed_to_resize")


@dataclass(frozen=True)
class Img2dataset:
    """a folder of shards that img2dataset wrote (output format webdataset)

    Numbers may have gaps; a shard without its _stats.json was not finished and is skipped. The caption is that of the
    .json, else the .txt. The identity of an image
    is the sha256 of the download (compute_hash sha256), so that one picture at two URLs is one item.
    """

    image: ClassVar[ImageRule | None] = ImageRule(384, "square")

    folder: str = argument("folder with NNNNN.tar and NNNNN_stats.json")
    caption_key: str = option(
        _CAPTION,
        "field of the .json that holds a caption, or a list of them: a name, or a path (meta.alt); commas part several",
    )
    without_stats: bool = option(False, "also read shards without _stats.json, as those of other tools")
    language: str = option("und", "language of the captions where no column says it")
    language_column: str = option("language", "field of the .json that holds the language")
    origin: str = option("human", "where the captions came from")

    def pieces(self) -> Iterator[JsonObject]:
        yield from shard_pieces(self.folder, without_stats=self.without_stats)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        for found in read_shard(piece):
            if not isinstance(found, tuple):
                yield found
                continue
            where, sample, fields = found
            captions = self._captions(sample, fields)
            if not self.selects(fields):
                yield Dropped("uid not in the list", where)
            elif not captions:
                yield Dropped("no caption" if captions is not None else "caption that is not UTF-8", where)
            else:
                yield image_record(where, sample, fields, short=captions)

    def _captions(self, sample: TarSample, fields: JsonObject) -> list[Text] | None:
        """The captions of the .json, else of the .txt, unless another field is named; None if that is no UTF-8."""
        said = fields.get(self.language_column)
        language = said if isinstance(said, str) and said.strip() else self.language
        texts = named_texts(fields, self.caption_key.split(","))
        found = [Text(text.strip(), code or language, "name", self.origin) for text, code in texts]
        if found or "txt" not in sample.members or self.caption_key != _CAPTION:
            return found
        try:
            text = sample.read("txt").decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
        return [] if is_blank(text) else [Text(text.strip(), language, "name", self.origin)]

    def selects(self, fields: JsonObject) -> bool:
        """Whether an image is selected, by its metadata."""
        return True


@dataclass(frozen=True)
class DataComp(Img2dataset):
    """a subset of DataComp, CommonPool or DFN: downloaded shards and a .npy list of uids

    The list is a sorted numpy array of uids, each as two unsigned 64-bit halves. Other images are left out.
    """

    uids: str = option("", "the .npy file (dtype u8,u8); without it everything is taken")

    def pieces(self) -> Iterator[JsonObject]:
        if self.uids:
            _check_sorted(self.uids)
        yield from super().pieces()

    def selects(self, fields: JsonObject) -> bool:
        """Whether the uid is in the list."""
        return not self.uids or _is_listed(self.uids, fields.get("uid"))


@cache
def _uids(path: str) -> Any:
    """The list of uids, memory-mapped."""
    import numpy as np

    try:
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # numpy's own message advises to unpickle the file
        raise UserError(f"{path}: not a .npy file that can be read; expected one list of uids, dtype u8,u8") from error
    if uids.dtype != np.dtype("u8,u8") or uids.ndim != 1:
        raise UserError(f"{path}: an array of {uids.dtype}; expected one list of uids, dtype u8,u8")
    return uids


def _check_sorted(path: str) -> None:
    uids = _uids(path)
    for begin in range(0, len(uids), 2**20):
        high, low = (uids[begin : begin + 2**20 + 1][half] for half in ("f0", "f1"))
        if ((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))).any():
            raise UserError(f"{path}: the uids are not sorted; sort them (`numpy.sort`) and save the list again")


def _is_listed(path: str, uid: Any) -> bool:
    """Whether a uid (32 hexadecimal digits) is in the list, by binary search."""
    try:
        wanted = int(uid[:16], 16), int(uid[16:32], 16)
    except (TypeError, ValueError):
        return False
    uids = _uids(path)

    def at(place: int) -> tuple[int, int]:
        high, low = uids[place]
        return int(high), int(low)

    place = bisect.bisect_left(range(len(uids)), wanted, key=at)
    return len(uid) == 32 and place < len(uids) and at(place) == wanted


def shard_pieces(folder: str, *, without_stats: bool = False) -> Iterator[JsonObject]:
    """The shards of a folder that img2dataset wrote. UserError if there are none.

    without_stats: read shards that have no _stats.json, too; they may be unfinished.
    """
    tars = sorted(path for path in Path(folder).glob("*.tar") if not is_hidden(path.name))
    if not tars:
        raise UserError(f"{folder}: holds no .tar; expected img2dataset's NNNNN.tar (output_format webdataset)")
    for tar in tars:
        stats = tar.with_name(f"{tar.stem}_stats.json")
        finished = (
            {"stats": str(stats), "stats_stamp": file_stat(stats)}
            if stats.exists()
            else {"stats": None, "read": without_stats}
        )
        yield {"file": str(tar), **file_stat(tar), **finished}


def read_shard(piece: JsonObject) -> Iterator[Dropped | Noted | tuple[str, TarSample, JsonObject]]:
    """(where, members, metadata) of each image of a shard, and what img2dataset itself left out."""
    path = Path(piece["file"])
    if piece["stats"] is None and not piece["read"]:
        yield Dropped("shard without _stats.json: not finished (--without-stats reads it)", path.name)
        return
    try:
        stats = parse_json(Path(piece["stats"]).read_bytes()) if piece["stats"] else {}
        for reason in _FAILED:
            if count := int(stats.get(reason, 0)):
                yield Dropped(f"img2dataset: {reason.replace('_', ' ')}", path.name, count)
    except (ValueError, AttributeError, TypeError, OverflowError):
        yield Dropped("shard whose _stats.json cannot be read", path.name)
        return
    for sample in tar_samples(path):
        if not isinstance(sample, TarSample):
            yield sample
            continue
        where = f"{path.name}: {sample.name}"
        if not any(extension in sample.members for extension in IMAGE_TYPES):
            yield Dropped("no image", where)
            continue
        fields = sample.json()
        if not isinstance(fields, dict):
            yield Dropped("metadata that is no JSON object", where)
        elif fields.get("status", "success") != "success":
            yield Dropped(f"img2dataset: {str(fields['status']).replace('_', ' ')}"[:60], where)
        else:
            yield where, sample, fields


def image_record(
    where: str, sample: TarSample, fields: JsonObject, *, short: Sequence[Text] = (), long: Sequence[Text] = ()
) -> ImageRecord:
    """The record of an image, identified by the hash of the download, or else by its key."""
    extension = next(extension for extension in IMAGE_TYPES if extension in sample.members)
    digest = fields.get("sha256")
    item = digest if isinstance(digest, str) and digest else sample.name
    return ImageRecord(where, item, sample.read(extension), short, long)
