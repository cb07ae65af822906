"""Files that are packed, by their first bytes: names are wrong too often, as where a server unpacks what it sends."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO

from data_prep.errors import UserError, needs

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
PACKED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)  # a packed file that is damaged
_HEADS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZSTD = 2**12  # bytes at a time: of a file that is cut short so many are lost
_OTHERS = {
    b"PK\x03\x04": "a zip, as .xlsx is one; unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "a file of old Excel; save the sheet as CSV UTF-8",
    b"PAR1": "parquet; give it a name that ends in .parquet",
    b"ARROW1": "Arrow; `data-prep import hf` reads it",
    b"%PDF-": "a PDF; `data-prep import pdf` reads it",
    b"SQLite format 3": "a SQLite database; export its table as CSV",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
}


def unpacked_name(name: str) -> str:
    """A file's name in small letters, without the ending that says how it is packed."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def is_packed(path: Path) -> bool:
    """Whether a file can be read from its beginning only. UserError as of `open_bytes`."""
    with _opened(path) as file:
        return _packing(path, file) is not None


def open_bytes(path: Path) -> IO[bytes]:
    """A file, unpacked if its bytes are those of gzip, bzip2, xz or zstd.

    Raises:
        UserError: it cannot be read, or is no text: a zip, a sheet of Excel, parquet.
    """
    with _opened(path) as file:
        packing = _packing(path, file)
    if packing == "zstd":
        return io.BufferedReader(_Zstd(path), 2**16)
    if packing == "gzip":
        return gzip.open(path)  # type: ignore[return-value]
    if packing == "bzip2":
        return bz2.open(path)
    return lzma.open(path) if packing == "xz" else path.open("rb")


class _Zstd(io.RawIOBase):
    """A stream of pyarrow's, whose faults are those of other packed files."""

    def __init__(self, path: Path) -> None:
        pyarrow = needs("pyarrow", extra="parquet", what="unpacking zstd")
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            found = self._stream.read(min(len(buffer), _ZSTD))
        except OSError as error:
            raise zlib.error(str(error)) from error
        buffer[: len(found)] = found
        return len(found)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _packing(path: Path, file: IO[bytes]) -> str | None:
    try:
        head = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    file.seek(0)
    if other := next((what for mark, what in _OTHERS.items() if head.startswith(mark)), None):
        raise UserError(f"{path}: is {other}")
    return next((name for mark, name in _HEADS.items() if head.startswith(mark)), None)
