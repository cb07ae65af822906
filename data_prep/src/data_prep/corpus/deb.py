"""Reading Debian packages and translation lists without Debian's tools, straight from the files.

python-debian would not make this smaller: it needs an external program for zstd too, and its reader takes 1.4 s for
the English translation list that `read_translations` reads in 0.5 s.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.errors import UserError
from data_prep.languages import LANGUAGES, OTHER_CODES

_TRANSLATION = re.compile(r"(?:.*_)?Translation-([A-Za-z]+(?:(?:_|%5f)[A-Za-z]+)?)(\.gz|\.bz2|\.xz)?")
_OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]


@dataclass(frozen=True, slots=True)
class Package:
    """A .deb file on the disk."""

    name: str
    version: str
    path: Path

    def record(self) -> dict[str, str]:
        """Name, version and checksum, for corpus.json."""
        return {"name": self.name, "version": self.version, "sha256": file_sha256(self.path)}


def file_sha256(path: Path) -> str:
    """Checksum of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_package(directory: Path, name: str) -> Package | None:
    """The package `name` among the .deb files of a folder; with several versions, the last by file name."""
    found = sorted(directory.glob(f"{name}_*.deb"))
    if not found:
        return None
    return Package(name, found[-1].name.split("_")[1].replace("%3a", ":"), found[-1])


def read_members(package: Package, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The package's files with a `wanted` path ("usr/share/…"), sorted by path.

    Raises:
        UserError: the file is no Debian package, is damaged or cut short.
    """
    found: dict[str, bytes] = {}
    links: dict[str, str] = {}
    try:
        with _open_data(package.path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if not wanted(path):
                    continue
                if member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    found[path] = file.read()
                elif member.islnk():
                    links[path] = member.linkname.removeprefix("./")
    except UserError:
        raise
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{package.path}: cannot be unpacked ({error}); fetch the file again") from error
    found.update({path: found[target] for path, target in links.items() if target in found})
    return dict(sorted(found.items()))


def parse_xml(data: bytes) -> ET.Element:
    """The root of an XML file of a package. ValueError if it is none, or in a character set that cannot be read."""
    try:
        return ET.fromstring(data)
    except (ET.ParseError, LookupError) as error:  # it names its character set itself
        raise ValueError(f"not XML that can be read: {error}") from error


def find_translations(directory: Path) -> dict[str, list[Path]]:
    """Apt's package descriptions in a folder, by our language code: `Translation-de`, also `.gz`, `.bz2`, `.xz`.

    A language can have several (release and updates, pt and pt_BR); earlier ones take precedence.
    """
    found: dict[str, list[tuple[bool, Path]]] = {}
    for path in sorted(directory.iterdir()):
        match = _TRANSLATION.fullmatch(path.name)
        if match:
            code = match[1].replace("%5f", "_")
            language = OTHER_CODES.get(code, code)
            if language in LANGUAGES:
                found.setdefault(language, []).append((code not in LANGUAGES, path))
    return {language: [path for _, path in sorted(paths)] for language, paths in sorted(found.items())}


def read_translations(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(package, md5 of the English description, title, body) of each stanza; the body's paragraphs end in newlines."""
    opener = _OPENERS.get(path.suffix)
    try:
        raw = opener(path).read() if opener else path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the file again") from error
    for stanza in raw.decode("utf-8", errors="replace").split("\n\n"):
        package = md5 = title = None
        body: list[str] = []
        for line in stanza.splitlines():
            if line.startswith("Package: "):
                package = line[9:].strip()
            elif line.startswith("Description-md5: "):
                md5 = line[17:].strip()
            elif line.startswith("Description-"):
                title = line.partition(": ")[2].strip()
            elif line.startswith(" ") and title is not None:
                body.append(line[1:])
        if package and md5 and title and "\ufffd" not in stanza:
            yield package, md5, title, "\n".join("" if line == "." else line for line in body)


def _open_data(path: Path) -> IO[bytes]:
    """The package's data.tar, as it is packed. A .deb is an `ar` archive: a magic line, then 60-byte headers."""
    file = path.open("rb")
    if file.read(8) != b"!<arch>\n":
        raise UserError(f"{path}: not a Debian package; fetch the file again")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if size < 0:  # or the same header would be read for ever
            raise ValueError(f"a part of {size} bytes")
        if name == "data.tar.zst":
            return _open_with_dpkg(path, name)
        if name.startswith("data.tar"):  # `tarfile` sees how it is packed
            return file
        file.seek(size + size % 2, 1)
    raise UserError(f"{path}: holds no data.tar: cut short; fetch the file again")


def _open_with_dpkg(path: Path, name: str) -> IO[bytes]:
    """Ubuntu packs with zstd, which Python reads from 3.14 on."""
    if shutil.which("dpkg-deb") is None:
        raise UserError(
            f"{path}: packed as {name}, which needs `dpkg-deb`; take Debian's package (packed with xz) instead"
        )
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process.stdout
