"""MosaicML's MDS shards.

Read here, not by mosaicml-streaming: that needs numpy below 2.2, transformers below 5 and the clients of four clouds,
so it cannot be installed beside the trainer. The tests read files that it wrote. The format: a number of samples and
their offsets; then of each sample the sizes of its columns of no fixed size, and the columns.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.records import Dropped, Row, argument, file_stat, option
from data_prep.sources.row_columns import Kinds, is_image_name
from data_prep.sources.row_sets import RowSet

_IMAGES = ("jpeg", "png", "pil")
_LISTS = {"list[jpeg]": 4, "list[png]": 4, "jpeg_array": 0, "jpegarray": 0}  # bytes before the number of images
_NUMBERS = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "int8": "b", "int16": "h", "int32": "i"}
_NUMBERS |= {"int": "q", "int64": "q", "float16": "e", "float32": "f", "float64": "d"}
_NUMBERED_TEXTS = {"str_int": int, "str_float": float, "str_decimal": str}
_CODECS = {"gz": "gzip", "bz2": "bz2", "br": "brotli", "zstd": "zstd"}
_ROWS = 500
_LARGEST = 2**32  # bytes of a shard: its offsets have 32 bits
_BROKEN = (struct.error, ValueError, IndexError, OverflowError)


@dataclass(frozen=True)
class Mds(RowSet):
    """MosaicML's MDS: a folder with index.json, also with compressed shards

    With a column of images (jpeg, png, pil, or bytes named so) its rows are images with captions; else they are texts,
    as of `import hf`. Pickled columns are not read.
    """

    data: str = argument("folder of index.json, or one above train, val …")
    split: str = option("", "folder inside DATA")

    def found(self) -> tuple[Kinds | None, Iterator[JsonObject]]:
        folder = self._folder()
        shards = _shards(folder)
        kinds: dict[str, str] = {}
        names = shards[0]["column_names"]
        for name, encoding in zip(names, shards[0]["column_encodings"], strict=True):
            text = {"str": "text", "json": "text", "bytes": "bytes"}.get(encoding, "")
            kinds[name] = "image" if _is_image(name, encoding, names) else text
        return Kinds(kinds), self._pieces(folder, shards)

    def rows(self, piece: JsonObject, columns: Sequence[str]) -> Iterator[Row | Dropped]:
        """The samples `first` to `end` of a shard."""
        shard, path = piece["shard"], Path(piece["file"])
        with _opened(path, shard) as file:
            file.seek(4 * (1 + piece["first"]))
            count = piece["end"] - piece["first"]
            try:
                offsets = struct.unpack(f"<{count + 1}I", file.read(4 * (count + 1)))
            except struct.error:
                yield Dropped("samples of a shard that is cut short", f"{path.name}, from {piece['first'] + 1}", count)
                return
            for number, (begin, end) in enumerate(pairwise(offsets), piece["first"] + 1):
                where = f"{path.name}, sample {number}"
                try:
                    if begin > end:
                        raise ValueError("it ends before it begins")
                    file.seek(begin)
                    row = _sample(file.read(end - begin), shard, columns)
                except _BROKEN as error:
                    yield Dropped("sample that cannot be read", f"{where} ({error})"[:200])
                else:
                    yield where, row

    def _folder(self) -> Path:
        folder = Path(self.data) / self.split
        if (folder / "index.json").is_file():
            return folder
        splits = sorted(path.parent.name for path in folder.glob("*/index.json"))
        more = f"; --split may be {', '.join(splits)}" if splits else ""
        raise UserError(f"{folder}: holds no index.json of MDS{more}")

    def _pieces(self, folder: Path, shards: list[JsonObject]) -> Iterator[JsonObject]:
        for shard in shards:
            raw, packed = folder / shard["raw"], folder / (shard["packed"] or shard["raw"])
            path = raw if raw.is_file() else packed
            try:
                stamp = file_stat(path)
            except OSError as error:
                raise UserError(
                    f"{path}: index.json names this shard, which cannot be read ({error.strerror})"
                ) from error
            codec = "" if path == raw else shard["codec"]
            rows = shard["samples"] if codec else _ROWS  # a packed one is unpacked whole
            for first in range(0, shard["samples"], max(rows, 1)):
                end = min(first + rows, shard["samples"])
                yield {"file": str(path), **stamp, "shard": {**shard, "codec": codec}, "first": first, "end": end}


def _shards(folder: Path) -> list[JsonObject]:
    """The shards that index.json names, with what is needed of each. UserError if it is no index of MDS."""
    index = folder / "index.json"
    try:
        found = [_shard(shard) for shard in parse_json(index.read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of MDS ({error!r:.200}); expected version 2, format mds") from error
    if not found:
        raise UserError(f"{index}: names no shards")
    return found


def _shard(shard: JsonObject) -> JsonObject:
    if shard["version"] != 2 or shard["format"] != "mds":
        raise ValueError(f"version {shard['version']}, format {shard['format']}")
    names, encodings, sizes = (list(shard[f"column_{each}"]) for each in ("names", "encodings", "sizes"))
    packed = shard["zip_data"]["basename"] if shard["zip_data"] else None
    files = [name for name in (shard["raw_data"]["basename"], packed) if name is not None]
    if len(names) != len(encodings) or len(names) != len(sizes) or not all(isinstance(n, str) for n in names):
        raise ValueError("as many names, encodings and sizes of columns were expected")
    if any(not isinstance(name, str) or "/" in name or name in ("", "..", "\0") for name in files):
        raise ValueError("a shard outside the folder")
    if not 0 <= int(shard["samples"]) < _LARGEST:
        raise ValueError(f"{shard['samples']} samples")
    return {
        "column_names": names,
        "column_encodings": list(map(str, encodings)),
        "column_sizes": [None if size is None else int(size) for size in sizes],
        "codec": (shard["compression"] or "").partition(":")[0],
        "samples": int(shard["samples"]),
        "raw": files[0],
        "packed": packed,
        "bytes": int(shard["raw_data"]["bytes"]),
    }


def _opened(path: Path, shard: JsonObject) -> Any:
    """The unpacked shard, as a file that can seek. UserError if it cannot be unpacked."""
    if not shard["codec"]:
        return path.open("rb")
    arrow = needs("pyarrow", extra="parquet", what="reading compressed MDS")
    if not 0 < shard["bytes"] < _LARGEST:
        raise UserError(
            f"{path}: index.json says that it has {shard['bytes']} bytes unpacked; expected less than 4 GiB"
        )
    try:
        if shard["codec"] == "snappy":
            return io.BytesIO(arrow.decompress(path.read_bytes(), shard["bytes"], "snappy", asbytes=True))
        with arrow.input_stream(str(path), compression=_CODECS.get(shard["codec"], shard["codec"])) as stream:
            return io.BytesIO(stream.read(shard["bytes"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be unpacked as {shard['codec']} ({error}); expected the shard whole"
        ) from error


def _is_image(name: str, encoding: str, beside: Sequence[str]) -> bool:
    return encoding in (*_IMAGES, *_LISTS) or (encoding == "bytes" and is_image_name(name, beside))


def _sample(data: bytes, shard: JsonObject, columns: Sequence[str]) -> JsonObject:
    """The values of those of `columns` (() for all) that the sample has; None for one of an encoding that is not
    read."""
    sizes, place = [], 0
    for size in shard["column_sizes"]:
        if not size:
            (size,) = struct.unpack_from("<I", data, place)
            place += 4
        sizes.append(size)
    row: JsonObject = {}
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes, strict=True):
        if place + size > len(data):
            raise ValueError("it is cut short")
        if not columns or name in columns:
            row[name] = _value(encoding, data[place : place + size])
        place += size
    return row


def _value(encoding: str, data: bytes) -> Any:
    if encoding in ("bytes", "jpeg", "png"):
        return data
    if encoding == "str":
        return data.decode("utf-8")
    if encoding == "json":
        return parse_json(data)
    if encoding == "pil":
        return _png(data)
    if encoding in _NUMBERS:
        return struct.unpack(f"<{_NUMBERS[encoding]}", data)[0]
    if encoding in _NUMBERED_TEXTS:
        return _NUMBERED_TEXTS[encoding](data.decode("utf-8"))
    if encoding in _LISTS:
        return _listed(data[_LISTS[encoding] :])
    return None


def _listed(data: bytes) -> list[bytes]:
    """The files in a list of images: their number, their sizes, themselves."""
    (count,) = struct.unpack_from("<I", data)
    sizes = struct.unpack_from(f"<{count}I", data, 4)
    place, found = 4 * (1 + count), []
    for size in sizes:
        found.append(data[place : place + size])
        place += size
    return found


def _png(data: bytes) -> bytes:
    """The pixels of a PIL image (width, height, length of the mode, mode, pixels) as a PNG."""
    from PIL import Image

    width, height, length = struct.unpack_from("<III", data)
    pixels, mode = data[12 + length :], data[12 : 12 + length].decode("ascii")
    if width * height > 8 * len(pixels):  # 8 of mode "1" in a byte; Pillow would set memory aside first
        raise ValueError("not as many pixels as its size says")
    buffer = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
