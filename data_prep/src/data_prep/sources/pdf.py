"""PDF files: pages as images with their text layer as captions; and TAT-DQA, questions about such pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_prep.errors import UserError, needs
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.answers import answer_text, question_caption
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.records import Dropped, Found, ImageRecord, Noted, argument, file_stat, from_rows, option
from data_prep.sources.texts import files_in

if TYPE_CHECKING:
    from data_prep.sources.pdf_pages import PdfPages

PAGES = ImageRule(1024, encoding="png", kernel="bicubic")
_BYTES = 32 * 2**20  # of PDF files in a piece
_FILES = 64
_DOCUMENTS = 100
_SECONDS = 15
_GIVEN_UP = 3  # pages of a file; then it is left


@dataclass(frozen=True)
class PdfFolder:
    """a folder of PDF files: a sample a page, its text layer as the long caption

    A page without text (a scan) is left out; so is one that takes too long to draw, or holds an image of more than 100
    million pixels.
    """

    image: ClassVar[ImageRule | None] = PAGES

    folder: tuple[str, ...] = argument("PDF files, or folders of them")
    language: str = option("und", "language of the texts")
    max_pages: int = option(1000, "pages of a file at most")
    side: int = option(PAGES.size, "pixels of a page's shortest side when it is drawn")
    page_seconds: int = option(_SECONDS, "processor seconds for a page; one that takes longer is given up")

    def pieces(self) -> Iterator[JsonObject]:
        _check(self.max_pages, self.side, self.page_seconds)
        files: dict[str, str] = {}
        stamps: list[JsonObject] = []
        for path, name in _named(files_in(self.folder, (".pdf",)), list(map(Path, self.folder))):
            files[str(path)] = name
            stamps.append(file_stat(path))
            if len(files) == _FILES or sum(one["bytes"] for one in stamps) > _BYTES:
                yield {"files": files, "stamps": stamps}
                files, stamps = {}, []
        if files:
            yield {"files": files, "stamps": stamps}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        from data_prep.sources.pdf_pages import PdfPages

        with PdfPages(self.side, self.page_seconds) as pages:
            for path, name in piece["files"].items():
                yield from self._pages(pages, Path(path), name)

    def _pages(self, pages: PdfPages, path: Path, name: str) -> Iterator[Found]:
        from data_prep.sources.pdf_pages import PdfGivenUp, PdfRefused

        try:
            count = pages.count(path)
        except PdfRefused as error:
            yield Dropped(f"PDF {error}", name)
            return
        if count > self.max_pages:
            yield Dropped("page beyond --max-pages", name, count - self.max_pages)
        given_up = 0
        for number in range(min(count, self.max_pages)):
            where = f"{name}, page {number + 1}"
            if given_up == _GIVEN_UP:
                reason = f"page of a PDF of which {_GIVEN_UP} pages were given up"
                yield Dropped(reason, where, min(count, self.max_pages) - number)
                return
            try:
                png, text = pages.draw(path, number)
            except PdfRefused as error:
                given_up += isinstance(error, PdfGivenUp)
                yield Dropped(f"page {error}", where)
                continue
            if text:
                yield ImageRecord(where, f"{name}/{number + 1}", png, long=[Text(text, self.language, "long")])
            else:
                yield Dropped("page without text", where)


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
    page_seconds: int = option(_SECONDS, "processor seconds for a page; one that takes longer is given up")

    def pieces(self) -> Iterator[JsonObject]:
        _check(1, self.side, self.page_seconds)
        if not Path(self.documents).is_dir():
            raise UserError(f"{self.documents}: no such folder")
        yield from list_pieces(self.questions, _DOCUMENTS)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        from data_prep.sources.pdf_pages import PdfPages

        with PdfPages(self.side, self.page_seconds) as pages:
            yield from from_rows(read_list(piece), partial(self._record, pages))

    def _record(self, pages: PdfPages, where: str, fields: JsonObject) -> Iterator[Found]:
        from data_prep.sources.pdf_pages import PdfRefused

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
        path = Path(self.documents) / f"{uid}.pdf"
        try:
            count = pages.count(path)
        except PdfRefused as error:
            yield Dropped(f"PDF {error}" if path.exists() else "PDF that is missing", f"{path.name} ({where})")
            return
        if count > 1 and not blocks:
            yield Noted("documents of several pages without UID.json, first page taken")
        for number, texts in sorted(captions.items()):
            try:
                png, _ = pages.draw(path, min(number, count - 1))
            except PdfRefused as error:
                yield Dropped(f"page {error}", f"{path.name}, page {number + 1}")
            else:
                yield ImageRecord(where, f"{uid}/{number + 1}", png, long=list(dict.fromkeys(texts)))


def _named(paths: list[Path], roots: list[Path]) -> list[tuple[Path, str]]:
    """Each file once, with a name of its own: that below its folder, but the whole path where two files share one."""
    names = {}
    for path in paths:
        root = next((root for root in roots if path != root and path.is_relative_to(root)), path.parent)
        names[path] = str(path.relative_to(root))
    counts = Counter(names.values())
    return [(path, name if counts[name] == 1 else str(path)) for path, name in names.items()]


def _check(max_pages: int, side: int, seconds: int) -> None:
    """UserError if no page could be drawn, or pdfium is not installed."""
    from data_prep.sources.pdf_pages import MAX_SIDE

    if max_pages < 1 or not 1 <= side <= MAX_SIDE or not 1 <= seconds <= 86_400:
        raise UserError(
            f"--max-pages {max_pages}, --side {side}, --page-seconds {seconds}: expected 1 page or more, 1 to "
            f"{MAX_SIDE} pixels, and 1 second to a day"
        )
    needs("pypdfium2", extra="pdf", what="reading PDF")


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
