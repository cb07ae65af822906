"""Everything that was found once: the files of `corpus/`, and a table of cases that are large but easily said.

An entry's `waits` names what is not mended yet (""): then its failure is expected, and its passing is not. `run.py
--settle` takes the mark off entries that hold.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz.data_sets import CONTENTS, described, npy, sidecar_of, tar, whole, whole_of_lines, with_table
from fuzz.harness import Files, Verdict
from fuzz.images import picture, png
from fuzz.model_folders import TIMM, pickled, whole_folders
from fuzz.values import dumped

FOLDER = Path(__file__).with_name("corpus")
WAITING = FOLDER / "waiting.json"
_NAME = 60  # characters of a file's name
_LONG = 3000  # characters of a text that is kept as it is


@dataclass(frozen=True)
class Entry:
    """A case that failed once. what: the failure that was found, as `Verdict.what` says it."""

    name: str
    kind: str
    what: str
    files: Files


def entries() -> list[Entry]:
    """All of the corpus, in order."""
    found = [_read(path) for path in sorted(FOLDER.glob("*.json")) if path != WAITING]
    return found + [Entry(name, kind, "", make()) for name, (kind, make) in LARGE.items()]


def waiting() -> dict[str, str]:
    """Entry → its failure, for those that are not mended yet."""
    return json.loads(WAITING.read_text()) if WAITING.is_file() else {}


def set_waiting(names: dict[str, str]) -> None:
    """Write which entries are not mended yet."""
    WAITING.write_text(json.dumps(dict(sorted(names.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save(kind: str, files: Files, verdict: Verdict, folder: Path = FOLDER) -> Path:
    """Write a case as an entry; the same failure of the same kind has one file."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{verdict.what}".lower()).strip("-")[:_NAME].strip("-")
    content = {"kind": kind, "what": verdict.what, "files": {name: _plain(data) for name, data in files.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _plain(data: bytes) -> str | dict[str, str]:
    """Short text as it is; other bytes packed, in base64: tars are mostly zeros."""
    try:
        text = data.decode("utf-8")
        if len(text) < _LONG and all(sign.isprintable() or sign in "\n\t" for sign in text):
            return text
    except UnicodeDecodeError:
        pass
    return {"zlib": base64.b64encode(zlib.compress(data, 9)).decode()}


def _read(path: Path) -> Entry:
    stored = json.loads(path.read_text(encoding="utf-8"))
    files = {n: d.encode() if isinstance(d, str) else _bytes(d["zlib"]) for n, d in stored["files"].items()}
    return Entry(path.stem, stored["kind"], stored["what"], files)


def _bytes(packed: str) -> bytes:
    return zlib.decompress(base64.b64decode(packed))


def _recipe(line: str) -> Callable[[], Files]:
    return lambda: {"recipe.yaml": f"{line}\n".encode()}


def _levels(count: int) -> str:
    """Anchors, each a list of nine of the one before."""
    lines = ["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, count))]
    return "\n".join(lines)


def _large() -> bytes:
    return png(13_000, 13_000, content=bytes(39_001), rows=13_000)


def _sample(kind: str, content: object, image: Callable[[], bytes] | None = None) -> Callable[[], Files]:
    """A tar of one sample with this .json and image, beside three whole ones."""

    def make() -> Files:
        members: list[tuple[str, bytes]] = []
        for number, one in enumerate((content, *(CONTENTS[kind],) * 3)):
            members += [(f"k{number}.png", image() if image and not number else picture("PNG"))] * kind.startswith(
                "image"
            )
            members.append((f"k{number}.json", dumped(one)))
        return {"kind": kind.encode(), "a.tar": tar(members)}

    return make


def _manifest(change: Callable[[dict], object]) -> Callable[[], Files]:  # type: ignore[type-arg]
    def make() -> Files:
        files = whole("text-pairs")
        manifest = json.loads(files["manifest.json"])
        change(manifest)
        return {**files, "manifest.json": dumped(manifest)}

    return make


def _sidecar(**fields: object) -> Callable[[], Files]:
    def make() -> Files:
        files = dict(whole_of_lines("text-pairs"))
        name = sidecar_of(files)
        first, *rest = files[name].splitlines()
        files[name] = b"\n".join([dumped({**json.loads(first), **fields}), *rest, b""])
        return described(files)

    return make


def _shard(**fields: object) -> Callable[[], Files]:
    return _manifest(lambda manifest: manifest["shards"][0].update(fields))


def _table(name: str, raw: Callable[[bytes], bytes]) -> Callable[[], Files]:
    """A sidecar or the table of shards, made of the right one, which the manifest describes correctly."""

    def make() -> Files:
        if name == "sidecar":
            files = dict(whole("text-pairs"))
            return described({**files, sidecar_of(files): raw(files[sidecar_of(files)])})
        files = dict(with_table(whole("text-pairs")))
        manifest, table = json.loads(files["manifest.json"]), raw(files["shards.npy"])
        manifest["shards"] |= {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()}
        return {**files, "shards.npy": table, "manifest.json": dumped(manifest)}

    return make


def _column(name: str, value: object) -> Callable[[bytes], bytes]:
    """The first record of a table has another value."""

    def change(raw: bytes) -> bytes:
        table = np.load(io.BytesIO(raw))
        table[name][0] = value
        return npy(table)

    return change


def _quotes() -> Files:
    return {"importer": b"sharegpt4v", "set.json": b'[{"image": "' + b'\\"' * 200_000}


def _model(loader: str, file: str, content: bytes) -> Callable[[], Files]:
    def make() -> Files:
        return {"loader": loader.partition("/")[0].encode(), **whole_folders()[loader], file: content}

    return make


def _checkpoint_path() -> Files:
    config = {**TIMM, "model_args": {**TIMM["model_args"], "checkpoint_path": "model/evil.bin"}}  # type: ignore[dict-item]
    return _model("vision/timm", "model/config.json", dumped(config))() | {"model/evil.bin": pickled()[0]}


def _numbered() -> Files:
    """Weights whose names are numbers."""
    files = {**whole_folders()["text/sentences"], "model/pytorch_model.bin": pickled()[9]}
    return {"loader": b"text", **{n: content for n, content in files.items() if n != "model/model.safetensors"}}


LARGE: dict[str, tuple[str, Callable[[], Files]]] = {
    "captions that are strings": ("tars", _sample("image-short", {"captions": ["a dog"]})),
    "captions that are numbers": ("tars", _sample("image-short", {"captions": [1, None]})),
    "a caption without language": ("tars", _sample("image-short", {"captions": [{"text": "a dog"}]})),
    "a caption without text": ("tars", _sample("image-short", {"captions": [{"language": "en"}]})),
    "captions nested deeply": ("tars", _sample("image-short", {"captions": ["@deep@"]})),
    "a query that is null": ("tars", _sample("text-pairs", {"query": [None], "target": [{"text": "a",
    "language": "en"}]})),
    "negatives without language": ("tars", _sample("text-triplets", {**CONTENTS["text-triplets"],
    "negatives": [[{"text": "a"}], ["b"]]})),
    "a manifest whose shard ends in NUL": ("manifests", _shard(name="a\0.tar")),
    "a manifest whose shard is a half pair": ("manifests", _shard(name="\ud800.tar")),
    "a manifest of negative samples": ("manifests", _manifest(lambda m: (m.update(samples=-4),
    m["shards"][0].update(samples=-4)))),
    "a manifest of 64-bit samples": ("manifests", _manifest(lambda m: (m.update(samples=2**70),
    m["shards"][0].update(samples=2**70)))),
    "a sidecar with a negative size": ("sidecars", _sidecar(members={"json": [512, -1]})),
    "a sidecar with a 64-bit size": ("sidecars", _sidecar(members={"json": [512, 2**62]})),
    "a sidecar with a 70-bit offset": ("sidecars", _sidecar(members={"json": [2**70, 1]})),
    "a sidecar whose key is a half pair": ("sidecars", _sidecar(key="\ud800")),
    "a sidecar whose key is a list": ("sidecars", _sidecar(key=["a"])),
    "a table with a member outside": ("sidecars", _table("sidecar", _column("json", (512, 2**63)))),
    "a table with a wrapping member": ("sidecars", _table("sidecar", _column("json", (2**64 - 512, 1024)))),
    "a table whose key is no text": ("sidecars", _table("sidecar", _column("key", b"\xff"))),
    "a table whose key ends in half a letter": ("sidecars", _table("sidecar", _column("key", b"a\xc3"))),
    "a table whose language is no text": ("sidecars", _table("sidecar", _column("languages", b"\xff"))),
    "a table of objects": ("sidecars", _table("sidecar", lambda raw: raw.replace(b"'<i4'", b"'|O'  "[:5]))),
    "a table of 2^60 records": ("sidecars", _table("sidecar", lambda raw: raw.replace(b"(4,), }" + 14 * b" ",
    b"(%d,), } " % 2**60))),
    "a table that is cut": ("sidecars", _table("sidecar", lambda raw: raw[:-1])),
    "a table that goes on": ("sidecars", _table("sidecar", lambda raw: raw + b"\0")),
    "a table without records": ("sidecars", _table("sidecar", lambda raw: b"")),
    "shards in a table that lie outside": ("manifests", _table("shards", _column("name", b"../a.tar"))),
    "a table of negative samples": ("manifests", _table("shards", _column("samples", -4))),
    "a recipe of dates": ("recipes", _recipe("seed: 2020-01-01 25:61:61")),
    "a recipe's impossible timestamp": ("recipes", _recipe("seed: !!timestamp 2020-99-99")),
    "a recipe in Latin-1": ("recipes", lambda: {"recipe.yaml": "name: ü".encode("latin-1")}),
    "a recipe's 5,000 digits": ("recipes", _recipe("seed: " + "9" * 5000)),
    "a recipe's anchor in itself": ("recipes", _recipe("model: &a [*a]")),
    "a recipe's nine levels of anchors": ("recipes", _recipe(_levels(9))),
    "a recipe nested deeply": ("recipes", _recipe("model: " + "[" * 3000)),
    "quotes in ShareGPT4V": ("importers", _quotes),
    "a PNG that is EPS": ("images", lambda: {"image.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}),
    "a PNG of 169 megapixels": ("images", lambda: {"image.png": _large()}),
    "a sample of 169 megapixels": ("tars", _sample("image-short", CONTENTS["image-short"], _large)),
    "a PNG of 2^31 columns": ("images", lambda: {"image.png": png(2**31 - 1, 2**31 - 1)}),
    "model_args that unpickle": ("models", _checkpoint_path),
    "weights named by numbers": ("models", _numbered),
    "an adapter named outside": ("models", _model("text/ours", "model/config.json",
    b'{"adapters": ["../../escaped"]}')),
    "a config that is a list": ("models", _model("whole/ours", "model/config.json", b"[]")),
    "a whole model without scales": ("models", _model("whole/ours", "model/config.json",
    b'{"format": "trilith-dual-encoder/1"}')),
    "a byte that names no end": ("remote",
    lambda: {"manifest.json.answer": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na"}),
    "a redirect to a file": ("remote",
    lambda: {"manifest.json.answer": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"}),
    "a redirect of 10^20 bytes": ("remote",
    lambda: {"manifest.json.answer": b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: %d\r\n\r\n" % (10**20)}),
    "a redirect to ftp": ("remote",
    lambda: {"manifest.json.answer": b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1:1/x\r\n\r\n"}),
    "a redirect to loopback": ("remote",
    lambda: {"manifest.json.answer": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/x\r\n\r\n"}),
}  # fmt: skip
