"""Published sets' own files: lists of JSON, JSON lines, parquet and tars, through their importers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fuzz.data_sets import sound, tar
from fuzz.harness import Files, Kind, all_of, command
from fuzz.images import picture
from fuzz.values import changed, damaged, dumped, json_bytes
from hypothesis import strategies as st

_IMAGE = {"bytes": None, "path": "a.png"}
# Importer → its file, one element of it, and what holds the elements: a list, one under a key, lines, parquet, a tar.
_FORMS: dict[str, tuple[str, Any, str]] = {
    "sharegpt4v": ("set.json", {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A \"dog\"."}]}, "list"),
    "karpathy": ("set.json", {"filename": "a.png", "filepath": "", "cocoid": 1, "split": "train", "sentences": [
        {"raw": "a dog"}, {"raw": "ein Hund"}]}, "images"),
    "docvqa": ("set.json", {"questionId": 1, "question": "What?", "image": "a.png", "answers": ["a", "b"], "docId": 2,
                            "data_split": "train"}, "data"),
    "arxivqa": ("set.jsonl", {"id": "1", "image": "a.png", "question": "What?", "options": ["A) x", "B) y"],
    "label": "B",
                              "rationale": "r"}, "lines"),
    "scigraphqa": ("set.jsonl", {"image_file": "a.png", "id": "1", "caption": "c", "q_a_pairs": [["q", "a"]]}, "lines"),
    "vidore": ("set.parquet", {"query": "What?", "image": _IMAGE, "image_filename": "a", "options": "['A', 'B']",
    "answer": "A",
                               "page": "1", "model": "m", "prompt": "p", "source": "s"}, "parquet"),
    "arxivcap": ("set.parquet", {"caption_images": [{"caption": "c", "cil_pairs": [{"sub_caption": "s",
    "image": _IMAGE}]}]},
                 "parquet"),
    "xm3600": ("set.jsonl", {"image/key": "a", "en": {"caption": ["a dog"]}, "de": {"caption": ["ein Hund"]}}, "lines"),
    "coco": ("set.json", {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [
        {"image_id": 1, "caption": "a dog"}]}, "whole"),
    "img2dataset": ("00000.tar", {"caption": "a dog", "language": "en", "status": "success", "sha256": "00",
    "key": "1"}, "tar"),
}  # fmt: skip
_IN_A_FOLDER = ("sharegpt4v", "karpathy", "docvqa", "arxivqa", "scigraphqa", "xm3600", "coco")
_EVALSETS = ("xm3600", "coco")


def _import(folder: Path) -> None:
    from data_prep.cli import main

    name = (folder / "importer").read_text()
    file = folder / _FORMS[name][0]
    if not file.exists():  # SciGraphQA has two forms
        file = folder / "set.json"
    where = (folder,) if name == "img2dataset" else (file, folder) if name in _IN_A_FOLDER else (file,)

    what = "evalset" if name in _EVALSETS else "import"

    all_of(lambda: command(main, what, name, *where, "--out", "made", "--workers", 1), lambda: sound(Path("made")))


def _pictures(name: str) -> Files:
    return {"a.jpg": picture("JPEG")} if name == "xm3600" else {"a.png": picture("PNG")}


def _packed(name: str, elements: list[Any]) -> bytes:
    """The importer's file of these elements."""
    form = _FORMS[name][2]
    if form == "lines":
        return b"".join(dumped(element) + b"\n" for element in elements)
    if form == "parquet":
        return _parquet(elements)
    if form == "tar":
        members = [(f"{n:09}.{ending}", content) for n, element in enumerate(elements)
                   for ending, content in (("png", picture("PNG")), ("json", dumped(element)), ("txt",
                   b"a dog"))]  # fmt: skip
        return tar(members)
    if form == "whole":
        return dumped(elements[0])
    return dumped(elements if form == "list" else {"info": {"a": [1]}, form: elements})


def _parquet(elements: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    def with_pictures(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: picture("PNG") if k == "bytes" and v is None else with_pictures(v) for k, v in value.items()}
        return [with_pictures(one) for one in value] if isinstance(value, list) else value

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([with_pictures(element) for element in elements]), buffer)
    return buffer.getvalue()


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    name = draw(st.sampled_from(sorted(_FORMS)))
    file, element, form = _FORMS[name]
    elements = draw(st.lists(st.one_of(changed(element), st.just(element)), min_size=1, max_size=3))
    try:
        content = _packed(name, elements)
    # What pyarrow raises for rows that are not of one type, as a column's must be, or no rows at all.
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        content = _packed(name, [element])
    if form == "whole":
        content = draw(st.one_of(st.just(content), json_bytes(element)))
    elif form in ("list", "images", "data"):
        whole = [element] if form == "list" else {"info": [{}], form: [element]}
        content = draw(st.one_of(st.just(content), damaged(content), json_bytes(whole), _quotes(content)))
    else:
        content = draw(st.one_of(st.just(content), st.just(content), damaged(content)))
    if name == "scigraphqa" and draw(st.booleans()):
        file = "set.json"
        content = draw(json_bytes([element]))
    files = {"importer": name.encode(), file: content, **_pictures(name)}
    if form == "tar":
        files["00000_stats.json"] = draw(st.one_of(st.just(b"{}"), json_bytes({"failed_to_download": 1, "count": 2})))
    return files


def _quotes(content: bytes) -> st.SearchStrategy[bytes]:
    """Many quotes and backslashes, on which a scanner may take quadratic time."""
    parts = st.sampled_from((b'\\"', b'"\\', b'"', b"\\", b"[", b"{", b'["'))
    return st.builds(lambda part, times, at: content[:at] + part * times + content[at:], parts,
                     st.sampled_from((1, 2, 1000, 60_000)), st.integers(0, len(content)))  # fmt: skip


def _valid() -> list[Files]:
    found = []
    for name, (file, element, form) in _FORMS.items():
        files = {"importer": name.encode(), file: _packed(name, [element]), **_pictures(name)}
        found.append({**files, "00000_stats.json": b"{}"} if form == "tar" else files)
    return found


KINDS = [Kind("importers", _import, _valid, _cases)]
