"""PDF files: pages as images with their text layer as captions; and TAT-DQA, questions about such pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError, needs
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.answers import answer_text, question_caption
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.records import Dropped, Found, ImageRecord, Noted, argument, file_stat, from_rows, option
from data_prep.sources.texts import files_in

PAGES = ImageRule(1024, encoding="png", kernel="bicubic")
_BYTES = 32 * 2**20  # of PDF files in a piece
_FILES = 64
_DOCUMENTS = 100
_RENDERED = 4096  # pixels of a page's longest side at most, whatever its page box


@dataclass(frozen=True)
class PdfFolder:
    """a folder of PDF files: a sample a page, its text layer as the long caption

    A page without text (a scan) is left out.
    """

    image: ClassVar[ImageRule | None] = PAGES

    folder: tuple[str, ...] = argument("PDF files, or folders of them")
    language: str = option("und", "language of the texts")
    max_pages: int = option(1000, "pages of a file at most")
    side: int = option(PAGES.size, "pixels of a page's shortest side when it is drawn")

    def pieces(self) -> Iterator[JsonObject]:
        _check(self.max_pages, self.side)
        files: list[str] = []
        stamps: list[JsonObject] = []
        for path in files_in(self.folder, (".pdf", ".PDF")):
            files.append(str(path))
            stamps.append(file_stat(path))
            if len(files) == _FILES or sum(one["bytes"] for one in stamps) > _BYTES:
                yield {"files": files, "stamps": stamps}
                files, stamps = [], []
        if files:
            yield {"files": files, "stamps": stamps}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        for name in piece["files"]:
            path = Path(name)
            item = next((str(path.relative_to(root)) for root in self.folder if path.is_relative_to(root)), "")
            document = _open(path)
            if document is None:
                yield Dropped("PDF that cannot be read", path.name)
                continue
            with document:
                if len(document) > self.max_pages:
                    yield Dropped("page beyond --max-pages", path.name, len(document) - self.max_pages)
                for number in range(min(len(document), self.max_pages)):
                    where = f"{path.name}, page {number + 1}"
                    page = _drawn(document, number, self.side)
                    if page is None:
                        yield Dropped("page that cannot be drawn", where)
                    elif not page[1]:
                        yield Dropped("page without text", where)
                    else:
                        text = Text(page[1], self.language, "long")
                        yield ImageRecord(where, f"{item or path.name}/{number + 1}", page[0], long=[text])


@dataclass(frozen=True)
class TatDqa:
    """TAT-DQA: its JSON of questions and the folder of PDF files

    The image is the page that holds the answer (by the blocks of UID.json, if that file is beside the PDF), else the
    first page; questions about one page are captions of one sample. A number's scale ("million") follows it.
    """

    image: ClassVar[ImageRule | None] = PAGES

    questions: str = argument("tatdqa_dataset_train.json ([{doc, questions}])")
    documents: str = argument("folder of UID.pdf (and UID.json)")
    side: int = option(PAGES.size, "pixels of a page's shortest side when it is drawn")

    def pieces(self) -> Iterator[JsonObject]:
        _check(1, self.side)
        if not Path(self.documents).is_dir():
            raise UserError(f"{self.documents}: no such folder")
        yield from list_pieces(self.questions, _DOCUMENTS)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_list(piece), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        doc, questions = fields.get("doc"), fields.get("questions")
        uid = doc.get("uid") if isinstance(doc, dict) else None
        if not isinstance(uid, str) or not uid.isalnum() or not isinstance(questions, list):
            yield Dropped("no document or no questions", where)
            return
        blocks = _pages_of_blocks(Path(self.documents) / f"{uid}.json")
        captions: dict[int, list[Text]] = {}
        for question in questions:
            if not isinstance(question, dict):
                yield Dropped("not a JSON object", where)
                continue
            answer = answer_text(question.get("answer"))
            scale = question.get("scale")
            if answer and isinstance(scale, str) and scale:
                answer += f" {scale}"
            caption = question_caption(question.get("question"), answer, where=where, origin="human:joined")
            if isinstance(caption, Dropped):
                yield caption
            else:
                captions.setdefault(_page_of(question.get("block_mapping"), blocks), []).append(caption)
        if not captions:
            return
        document = _open(Path(self.documents) / f"{uid}.pdf")
        if document is None:
            yield Dropped("PDF that is missing or cannot be read", where)
            return
        with document:
            if len(document) > 1 and not blocks:
                yield Noted("documents of several pages without UID.json, first page taken")
            for number, texts in sorted(captions.items()):
                page = _drawn(document, min(number, len(document) - 1), self.side)
                if page is None:
                    yield Dropped("page that cannot be drawn", where)
                else:
                    yield ImageRecord(where, f"{uid}/{number + 1}", page[0], long=list(dict.fromkeys(texts)))


def _check(max_pages: int, side: int) -> None:
    """UserError if no page could be drawn, or pdfium is not installed."""
    if max_pages < 1 or not 1 <= side <= _RENDERED:
        raise UserError(f"--max-pages {max_pages}, --side {side}: expected 1 page or more, and 1 to {_RENDERED} pixels")
    _pdfium()


def _pdfium() -> Any:
    return needs("pypdfium2", extra="pdf", what="reading PDF")


def _open(path: Path) -> Any:
    """The document, a context manager; None if it cannot be read."""
    try:
        return _pdfium().PdfDocument(path)
    except (_pdfium().PdfiumError, OSError):
        return None


def _drawn(document: Any, number: int, side: int) -> tuple[bytes, str] | None:
    """A page as a PNG whose shortest side has at least `side` pixels, and its text; None if it cannot be drawn."""
    from data_prep.images import encode_image

    try:
        page = document[number]
        width, height = page.get_size()
        scale = min(side / max(min(width, height), 1), _RENDERED / max(width, height, 1))
        image = page.render(scale=scale).to_pil().convert("RGB")
        text = page.get_textpage().get_text_bounded()
    except (_pdfium().PdfiumError, ValueError, OSError, MemoryError):
        return None
    return encode_image(image, PAGES), " ".join(text.replace("\ufffe", "").replace("\0", "").split())


def _pages_of_blocks(path: Path) -> dict[str, int]:
    """Block → page, from 0; empty without that file."""
    try:
        pages = parse_json(path.read_bytes())["pages"]
        return {block["uuid"]: number for number, page in enumerate(pages) for block in page["blocks"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _page_of(mapping: object, blocks: dict[str, int]) -> int:
    """The page of the first block that an answer was taken from."""
    names = [name for part in mapping if isinstance(part, dict) for name in part] if isinstance(mapping, list) else []
    return next((blocks[name] for name in names if name in blocks), 0)
