"""Data sets whose tars, sidecars or manifests are foreign: read, validated, inspected, indexed and trained on."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fuzz.harness import Broken, Files, Kind, all_of, command
from fuzz.images import picture
from fuzz.values import changed, damaged, dumped, json_bytes, values
from hypothesis import strategies as st
from lines import as_lines
from numpy.lib.recfunctions import repack_fields

_RECIPE = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
_TEXT = {"text": "ein Hund", "language": "de", "origin": "human", "role": "name"}
_OTHER = {"text": "a dog", "language": "en", "origin": "human", "role": "name"}
CONTENTS: dict[str, Any] = {
    "image-short": {"captions": [_TEXT, _OTHER], "source": "s", "item": "s/1"},
    "image-long": {"captions": [_TEXT, _OTHER], "source": "s", "item": "s/2"},
    "text-pairs": {"query": [_TEXT], "target": [_TEXT, _OTHER], "source": "s", "item": "s/3"},
    "text-triplets": {"query": [_TEXT], "target": [_OTHER], "negatives": [[_OTHER], [_TEXT]], "source": "s",
    "item": "s/4"},
}  # fmt: skip
_NAMES = (
    "a",
    "b",
    "b",
    "dir/c",
    "../../escaped",
    "/abs",
    "x" * 200,
    "e\x1b[31m",
    "\udcff",
    "a b",
    "ü",
    ".json",
    "..",
    "",
)


def read(folder: Path) -> None:
    """Everything that reads a data set: sample by sample, `validate`, `inspect`, and a stage's batches."""
    from data_prep.cli import main

    all_of(
        partial(_samples, folder),
        partial(command, main, "validate", folder, "--workers", 1),
        partial(command, main, "inspect", folder, "--out", folder.parent / "inspect.html"),
        partial(_batches, folder),
    )


def sound(folder: Path) -> None:
    """What an importer published below a folder has no fault, whatever came in."""
    from data_prep.inspection.validate import validate

    made = [path.parent for path in folder.rglob("manifest.json") if ".partial" not in str(path)]
    problems = [str(problem) for one in made for problem in validate(one)]
    if problems:
        raise Broken("an importer publishes what `validate` refuses", "\n".join(problems[:3]))


def _samples(folder: Path) -> None:
    from data_prep.shards import Dataset

    data = Dataset.open(folder, verify=True)
    for index in range(min(len(data), 8)):
        all_of(partial(data.row, index), partial(data.read, index), partial(data.name, index))


def _batches(folder: Path) -> None:
    """Two batches of a stage, which must come whatever the samples hold, as long as some are of use."""
    from data_prep.shards import Dataset
    from stage_trainer.data.batches import StageBatches
    from stage_trainer.data.config import DataConfig
    from stage_trainer.recipe import BatchSizes, Rates, Source, Stage, StageData
    from stage_trainer.recipe.read import load

    class Letters:
        """A tokenizer that needs no file."""

        def __call__(self, texts: list[str], max_length: int | None = None) -> list[list[int]]:
            return [[0, *(3 + ord(letter) % 60 for letter in text), 2] for text in texts]

    kind = Dataset.open(folder).kind
    name = "text" if kind.startswith("text") else "image_text"
    stage = Stage(
        steps=2, resolution=((0, 16),), max_tokens=8, batch=BatchSizes(**{name: 2}), lr=Rates(image=1e-3, text=1e-3),
        data=StageData(**{name: (Source(path=str(folder.absolute())),)}),
    )  # fmt: skip
    batches = StageBatches(DataConfig.of(load(_RECIPE).recipe), stage, 0, Letters(), 0, 1)  # type: ignore[arg-type]
    for step in range(2):
        batches[step]


def _index(folder: Path) -> None:
    """`index` of the tars, then everything that reads what it made."""
    from data_prep.cli import main

    kind = (folder / "kind").read_text()
    out = folder.parent / "out"
    command(main, "index", folder, "--out", out, "--kind", kind, "--workers", 1)
    if (made := out / kind / "indexed").is_dir():
        read(made)


def tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An uncompressed tar; `kind` is that of its last member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for place, (name, content) in enumerate(members, 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if place == len(members) and kind != tarfile.REGTYPE:
                info.type, info.linkname, info.size = kind, "../../../etc/passwd", 0
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@cache
def whole(kind: str) -> Files:
    """A data set of four samples, as our own writer makes it."""
    from data_prep.shards import DatasetWriter

    content = json.dumps(CONTENTS[kind]).encode()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        with DatasetWriter(made, kind=kind, source="s", samples_per_shard=4) as writer:
            for number in range(4):
                members = {"json": content} if kind.startswith("text") else {"png": picture("PNG"), "json": content}
                writer.write(f"k{number}", members, languages=["de", "en"], tokens=5)
        return {path.name: path.read_bytes() for path in sorted(made.iterdir()) if path.name != ".lock"}


@cache
def whole_of_lines(kind: str) -> Files:
    """The same in the form before, whose sidecars are JSON lines."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in whole(kind).items():
            Path(folder, name).write_bytes(content)
        return {path.name: path.read_bytes() for path in sorted(as_lines(Path(folder)).iterdir())}


def with_table(files: Files) -> Files:
    """With the list of shards as a table."""
    from data_prep.shards import manifest

    document = json.loads(files["manifest.json"])
    with mock.patch.object(manifest, "LISTED", 0):
        document["shards"], table = manifest.shards_field(document["shards"])
    assert table is not None
    return {**files, "shards.npy": table, "manifest.json": dumped(document)}


@st.composite
def _tars(draw: st.DrawFn) -> Files:
    kind = draw(st.sampled_from(sorted(CONTENTS)))
    members: list[tuple[str, bytes]] = []
    for number in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from((*_NAMES, *(f"k{number}",) * 12)))
        json_member = draw(json_bytes(CONTENTS[kind]))
        if kind.startswith("image"):
            extension = draw(st.sampled_from(("png", "jpg", "webp", "PNG", "gif")))
            sound = [st.just(picture("PNG"))] * 4  # of others `index` makes nothing
            content = draw(st.one_of(*sound, damaged(picture("PNG")), st.binary(max_size=9)))
            members.append((f"{name}.{extension}", content))
            if draw(st.booleans()):
                text = st.text(st.characters(codec="utf-8"), max_size=9).map(str.encode)
                members.append((f"{name}.txt", draw(st.one_of(text, st.binary(max_size=9)))))
        members.append((f"{name}.json", json_member))
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    member_kind = draw(st.sampled_from((*(tarfile.REGTYPE,) * 6, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)))
    try:
        packed = tar(members, draw(st.sampled_from(forms)), member_kind)
    except (ValueError, UnicodeError):  # a name that this form cannot hold
        packed = tar(members)
    packed = draw(st.one_of(st.just(packed), st.just(packed), damaged(packed)))
    return {"kind": kind.encode(), "a.tar": packed}


@st.composite
def _sidecars(draw: st.DrawFn) -> Files:
    """A foreign sidecar, which the manifest describes correctly: a table, or lines as before."""
    of_lines = draw(st.booleans())
    files = dict((whole_of_lines if of_lines else whole)(draw(st.sampled_from(sorted(CONTENTS)))))
    name = sidecar_of(files)
    if not of_lines:
        return described({**files, name: draw(_tables(files[name]))})
    lines = files[name].splitlines()
    for place in draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=3, unique=True)):
        lines[place] = draw(json_bytes(json.loads(lines[place])))
    files[name] = b"\n".join(lines) + b"\n"
    return described(files)


@st.composite
def _tables(draw: st.DrawFn, raw: bytes) -> bytes:
    """A .npy file that differs from this one in bytes, in its header, in its columns or in their values."""
    how = draw(st.sampled_from(("bytes", "header", "columns", "values", "values")))
    if how == "bytes":
        return draw(damaged(raw))
    table = np.load(io.BytesIO(raw))
    if how == "header":
        head, _, rest = raw.partition(b"\n")
        names = (b"'<u8'", b"'<i4'", b"(4,)", b"'key'", b"'name'", b"'json'", b"False", b"'descr'")
        odd = (b"'|O'", b"'<f8'", b"'>u8'", b"(2**62,)", b"(-1,)", b"()", b"'S0'", b"[" * 5000, b"'__class__'", b"\xff")
        changed_head = head.replace(draw(st.sampled_from(names)), draw(st.sampled_from(odd)))
        size = len(changed_head) + 1 - 10
        return changed_head[:8] + struct.pack("<H", size % 2**16) + changed_head[10:] + b"\n" + rest
    if how == "columns":
        names = draw(st.permutations(table.dtype.names or ()))
        return npy(repack_fields(table[list(names[: draw(st.integers(1, len(names)))])]))
    for _ in range(draw(st.integers(1, 3))):
        view = table[draw(st.sampled_from(table.dtype.names or ()))]
        cells = np.frombuffer(draw(st.binary(min_size=view.nbytes, max_size=view.nbytes)), view.dtype)
        high = np.frombuffer(b"\xff" * view.nbytes, view.dtype)
        view[...] = draw(st.sampled_from((cells, high, np.zeros_like(cells)))).reshape(view.shape)
    return npy(table)


def npy(table: np.ndarray) -> bytes:
    """A table as numpy writes it."""
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def sidecar_of(files: Files) -> str:
    """The name of the first sidecar."""
    return next(name for name in files if ".index." in name)


def described(files: Files) -> Files:
    """With a manifest whose sizes and hashes are those of the files."""
    manifest = json.loads(files["manifest.json"])
    for shard in manifest["shards"]:
        index = sidecar_of(files)  # there is one shard
        for field, name in (("", shard["name"]), ("index_", index)):
            shard[f"{field}bytes"] = len(files[name])
            shard[f"{field}sha256"] = hashlib.sha256(files[name]).hexdigest()
    return {**files, "manifest.json": dumped(manifest)}


@st.composite
def _samples_of_a_set(draw: st.DrawFn) -> Files:
    """A whole data set, every hash right, with foreign texts in its samples."""
    from data_prep.shards import DatasetWriter

    kind = draw(st.sampled_from(sorted(CONTENTS)))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        with DatasetWriter(made, kind=kind, source="s", samples_per_shard=4) as writer:
            for number in range(4):
                members = {"json": draw(json_bytes(CONTENTS[kind]))}
                if kind.startswith("image"):
                    members = {"png": draw(st.one_of(st.just(picture("PNG")), damaged(picture("PNG")))), **members}
                writer.write(f"k{number}", members, languages=["de", "en"], tokens=5)
        return {path.name: path.read_bytes() for path in sorted(made.iterdir()) if path.name != ".lock"}


@st.composite
def _manifests(draw: st.DrawFn) -> Files:
    files = whole(draw(st.sampled_from(sorted(CONTENTS))))
    if draw(st.booleans()):
        files = with_table(files)
        if draw(st.booleans()):  # a foreign table, which manifest.json describes correctly
            manifest, raw = json.loads(files["manifest.json"]), draw(_tables(files["shards.npy"]))
            manifest["shards"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            return {**files, "shards.npy": raw, "manifest.json": dumped(manifest)}
    receipt = draw(st.one_of(st.none(), values.map(dumped), st.binary(max_size=9)))
    files = files if receipt is None else {**files, "receipt.json": receipt}
    manifest = draw(st.one_of(json_bytes(json.loads(files["manifest.json"])), _one_value(files["manifest.json"])))
    return {**files, "manifest.json": manifest}


def _one_value(manifest: bytes) -> st.SearchStrategy[bytes]:
    """A manifest whose shard alone differs, so that reading goes beyond its other fields."""
    document = json.loads(manifest)
    return changed(document["shards"]).map(lambda shards: dumped({**document, "shards": shards}))


def _indexed(kind: str) -> Files:
    files = whole(kind)
    return {"kind": kind.encode(), "a.tar": next(content for name, content in files.items() if name.endswith(".tar"))}


def _valid() -> list[Files]:
    return [form(kind) for kind in CONTENTS for form in (whole, whole_of_lines, lambda kind: with_table(whole(kind)))]


KINDS = [
    Kind("tars", _index, lambda: [_indexed(kind) for kind in CONTENTS], _tars),
    Kind("sidecars", read, _valid, _sidecars),
    Kind("samples", read, _valid, _samples_of_a_set),
    Kind("manifests", read, _valid, _manifests),
]
