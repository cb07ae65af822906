"""search.png: queries in several languages, and the images that a model finds for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from data_prep.shards import write_file
from PIL import Image, ImageDraw, ImageFont
from vision_tower import load_image

from stage_trainer.data.stateless_rng import key
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.evaluation.retrieval import EmbeddedPool, Pool, embed
from stage_trainer.files import writing
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe.limits import MAX_PIXELS

SHOWN_LANGUAGES = ("en", "de", "fr", "es", "pl", "ru", "el", "ar", "vi", "ka", "ja", "zh", "ko", "hi", "th")
ROWS = 12
TILE, GAP, LEFT, COLUMNS = 96, 10, 340, 6
TOP, LINE, LINES = 64, 25, 3
"""Space above the first row; line height of queries, and how many lines fit into a row."""
SIZE, SMALL = 20, 13
"""Font sizes of queries and notes, in pixels."""
RIGHT, INK, PALE = (24, 128, 56), (30, 30, 34), (120, 120, 128)

Row = tuple[str, str, list[tuple[bytes, bool]]]
"""(query, note on it, images found as (file, whether it is the right one))."""


def draw_search(
    model_directory: str | Path,
    data: str | Path,
    queries: Sequence[str],
    out: str | Path,
    say: Callable[[str], None],
    *,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Draws one row for each query: the text at the left, the nearest images of all pools at the right.

    Without `queries`, twelve captions of held-out images are taken, in as many languages as there are; the image that
    each belongs to is framed. `say` is called with what is searched, and which letters no font has.

    Raises:
        UserError: there are no images to search, the model or the data cannot be read, or the picture not written.
    """
    found = find(data)
    searched = [held_out for held_out in found.sets if held_out.images]
    short = [held_out for held_out in searched if held_out.kind == "image-short"]
    if short and not queries:  # long captions are mostly of the same images, and do not fit here
        searched = short
    if not searched:
        kinds = ", ".join(sorted({held_out.kind for held_out in found.sets}))
        raise UserError(f"{data} has no images to search, it holds {kinds}; give a folder with images and captions")
    model = DualEncoder.from_pretrained(model_directory)
    pools = [Pool.open(held_out.directory, max_pixels) for held_out in searched]
    count = len({image for pool in pools for image in pool.images})
    say(f"searching {count:,} images of {found.where}: {', '.join(f'{s.kind}/{s.directory.name}' for s in searched)}")
    fonts = fonts_of(Path(data))
    rows = _rows(model, pools, queries) if queries else own_rows(pools, [embed(model, pool) for pool in pools], fonts)
    if unknown := sorted({letter for query, _, _ in rows for letter in _missing(_pick(fonts, query, SIZE), query)}):
        say(f"no font here has {' '.join(unknown[:8])}, drawn as boxes; put one that does into {Path(data) / 'fonts'}")
    canvas, file = draw(rows, fonts, framed=not queries), BytesIO()
    try:
        canvas.save(file, Image.registered_extensions()[Path(out).suffix.lower()])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"could not draw the picture {out} ({error}); name another file that ends in .png") from error
    with writing(Path(out)):
        write_file(Path(out), file.getvalue())


def draw(rows: Sequence[Row], fonts: list[Path], *, framed: bool = True) -> Image.Image:
    """Draws one row for each query: its text at the left, the images found at the right, nearest first. A text that
    does not fit ends in "…".

    Args:
        framed: whether the image that a query was taken from has a frame, which the heading explains.
    """
    canvas = Image.new("RGB", (LEFT + COLUMNS * (TILE + GAP) + GAP, TOP + len(rows) * (TILE + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    room = LEFT - 2 * GAP
    pen.text((GAP, 20), "query", INK, _pick(fonts, "query", SIZE))
    heading = "nearest images" + (" (green frame: the query's own image)" if framed else "")
    _write(pen, (LEFT, 20), heading, INK, _pick(fonts, heading, SIZE), canvas.width - LEFT - GAP, 1)
    for row, (query, remark, found) in enumerate(rows):
        top = TOP + row * (TILE + GAP)
        _write(pen, (GAP, top), query, INK, _pick(fonts, query, SIZE), room, LINES)
        _write(pen, (GAP, top + TILE - SMALL - 4), remark, PALE, _pick(fonts, remark, SMALL), room, 1)
        for column, (file, right) in enumerate(found):
            left = LEFT + column * (TILE + GAP)
            tile = load_image(file)
            tile.thumbnail((TILE, TILE))
            canvas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            if right:
                pen.rectangle((left - 4, top - 4, left + TILE + 3, top + TILE + 3), outline=RIGHT, width=4)
    return canvas


def _rows(model: DualEncoder, pools: list[Pool], queries: Sequence[str]) -> list[Row]:
    # An image with a short and a long caption is in two data sets, but is shown once.
    images = list(dict.fromkeys(image for pool in pools for image in pool.images))
    vectors = model.encode_image(images)
    nearest = np.argsort(-(model.encode_text(list(queries)) @ vectors.T), axis=1)[:, :COLUMNS]
    return [(query, "", [(images[i], False) for i in row]) for query, row in zip(queries, nearest, strict=True)]


def own_rows(pools: list[Pool], embedded: list[EmbeddedPool], fonts: list[Path]) -> list[Row]:
    """Captions of held-out images as queries, alternating between pools, one in each language before a second in any;
    chosen by a hash, not by their results."""
    rows: list[Row] = []
    shown: set[tuple[int, int]] = set()
    here = {language for pool in pools for language in pool.texts}
    languages = [language for language in SHOWN_LANGUAGES if language in here] + sorted(here - {*SHOWN_LANGUAGES})
    for turn in range(ROWS * len(pools)):
        language = languages[turn % len(languages)]
        which = (turn + turn // len(languages)) % len(pools)  # so that each language meets each pool
        pool, vectors = pools[which], embedded[which]
        entries = [e for e in pool.texts.get(language, []) if (which, e[0]) not in shown]
        entries.sort(key=lambda entry: key("shown", entry))
        few = entries[:50]  # if no font has a script's letters, more entries do not help
        chosen = next((entry for entry in few if not _missing(_pick(fonts, entry[1], SIZE), entry[1])), None)
        if chosen is None or len(rows) == ROWS:
            continue
        number, text = chosen
        shown.add((which, number))
        order = np.argsort(-(unit(vectors.images) @ vectors.texts[vectors.row[text]]))
        rank = int(np.where(order == number)[0][0]) + 1
        meaning = "" if language == "en" else dict(pool.texts.get("en", [])).get(number, "")
        note = f"{language}, own image: number {rank} of {len(order)}" + (f" ({meaning})" if meaning else "")
        rows.append((text, note, [(pool.image(int(i)), bool(i == number)) for i in order[:COLUMNS]]))
    return rows


def fonts_of(data: Path) -> list[Path]:
    """The corpus's fonts, then the system's; without any, Pillow's built-in one covers Latin."""
    folders = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "/System/Library/Fonts")
    system = [path for folder in folders for path in Path(folder).expanduser().rglob("*.[to]t[fc]")]
    found = sorted((data / "fonts").glob("*.[to]t[fc]"))
    found += sorted(system, key=lambda path: (path.name != "DejaVuSans.ttf", str(path)))
    return [path for path in found if "Emoji" not in path.name]


def _pick(fonts: list[Path], text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has every letter of `text`, or else the one that lacks the fewest."""
    best, fewest = _load(None, size), len(text) + 1
    for path in [*fonts, None]:
        font = _load(path, size)
        if font is not None and (lacking := len(_missing(font, text))) < fewest:
            best, fewest = font, lacking
            if not fewest:
                break
    assert best is not None  # Pillow's own
    return best


@lru_cache(maxsize=512)
def _load(path: Path | None, size: int) -> ImageFont.FreeTypeFont | None:
    """None for a file that is not a font."""
    try:
        font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError:
        return None
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _missing(font: ImageFont.FreeTypeFont, text: str) -> list[str]:
    """The letters that a font lacks, and would draw as boxes."""
    return [letter for letter in sorted(set(text)) if letter.isprintable() and not _has(font, letter)]


@lru_cache(maxsize=65536)
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    width: int,
    lines: int,
) -> None:
    """Writes into a box of so many pixels and lines, from the side at which the script begins."""
    wrapped = _wrap(text, font, width, lines)
    to_left = _right_to_left(text)
    for number, line in enumerate(wrapped):
        # Ink may begin before the pen position or end after the advance, as in italics.
        left, _, right, _ = font.getbbox(line)
        x = corner[0] + width - right if to_left else corner[0] - min(0, left)
        pen.text((x, corner[1] + LINE * number), line, color, font)


def _right_to_left(text: str) -> bool:
    """Whether a text runs from right to left, by its first letter with a strong direction (UAX 9, P2)."""
    import unicodedata

    strong = (unicodedata.bidirectional(letter) for letter in text)
    return next((kind in ("R", "AL") for kind in strong if kind in ("L", "R", "AL")), False)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels, broken at spaces or else within a word; the rest becomes "…"."""
    rest = " ".join(text.split())
    wrapped: list[str] = []
    while rest and len(wrapped) < lines:
        if _width(font, rest) <= width:
            return [*wrapped, rest]
        if len(wrapped) == lines - 1:
            kept = _fitting(rest, font, width, "…")
            return [*wrapped, rest[:kept].rstrip() + "…"]
        kept = _fitting(rest, font, width)
        space = rest.rfind(" ", 0, kept + 1)
        kept = space if space > 0 else kept
        wrapped.append(rest[:kept].rstrip())
        rest = rest[kept:].lstrip()
    return wrapped


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int, end: str = "") -> int:
    """How many of a text's letters fit together with `end`, at least one; combining marks stay with their letter."""
    import unicodedata

    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _width(font, text[:middle] + end) <= width else (low, middle - 1)
    while 1 < low < len(text) and unicodedata.category(text[low]).startswith("M"):
        low -= 1
    return low


def _width(font: ImageFont.FreeTypeFont, text: str) -> float:
    left, _, right, _ = font.getbbox(text)
    return right - min(0, left)
