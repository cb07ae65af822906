"""The nearest-images picture: whatever a caption is, it stays in its own place."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from stage_trainer.evaluation.picture import GAP, LEFT, LINES, TILE, TOP, _wrap, draw, fonts_of, own_rows
from stage_trainer.evaluation.retrieval import EmbeddedPool, Pool

CAPTIONS = {
    "German": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft " * 3,
    "Chinese": "图片中有一个形状形状十字颜色黑色大小小位置在中央背景灰色" * 5,
    "Arabic": "صورة قطة حمراء صغيرة تجلس على سجادة زرقاء في وسط الغرفة " * 5,
    "Hindi": "नमस्ते दुनिया यह एक बहुत लंबा वाक्य है जो समाप्त नहीं होता " * 5,
    "no end": "W" * 500,
    "lines": "one\ntwo\tthree\n\nfour\nfive\nsix\nseven",
}


def encoded(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_no_text_runs_under_the_pictures_or_out_of_its_row(caption):
    """White tiles are invisible, so all ink is of text: none may lie in the tiles' columns, or between two rows."""
    canvas = draw([(caption, caption, [(encoded("white"), False)] * 6)] * 2, fonts_of(Path("nowhere")), framed=False)
    ink = np.asarray(canvas).min(axis=2) < 250
    rows = ink[TOP - 4 :]
    assert rows[:, :LEFT].any(), "the text is there"
    assert not rows[:, LEFT - GAP // 2 :].any()
    assert not rows[:, : GAP // 2].any(), "nor does it begin before the margin"
    assert not ink[TOP + TILE + 4 : TOP + TILE + GAP].any(), "what stands below a row belongs to the next"


def test_a_long_heading_stays_on_the_canvas():
    ink = np.asarray(draw([], fonts_of(Path("nowhere")))).min(axis=2) < 250
    assert ink[:, LEFT:].any()
    assert not ink[:, -GAP:].any()


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_wrapped_lines_are_the_text_in_its_order_up_to_an_ellipsis(caption):
    font = ImageFont.load_default(20)
    lines = _wrap(caption, font, 320, LINES)
    plain = " ".join(caption.split())
    assert 1 <= len(lines) <= LINES
    kept = "".join(lines).removesuffix("…").replace(" ", "")
    assert plain.replace(" ", "").startswith(kept)
    assert lines[-1].endswith("…") == (kept != plain.replace(" ", ""))
    assert _wrap("short", font, 320, LINES) == ["short"]
    assert _wrap("  ", font, 320, LINES) == []


def test_own_rows_take_every_language_in_turn_and_say_the_rank_of_the_right_image():
    """Languages that nobody listed too, and of every pool."""
    images = [encoded((number * 20, 0, 0)) for number in range(10)]
    texts = {language: [(i, f"{language} {i}") for i in range(10)] for language in ("en", "sw")}
    pools = [Pool("one", images, texts), Pool("two", images, texts)]
    vectors = np.eye(10, dtype=np.float32)
    names = pools[0].all_texts()
    embedded = EmbeddedPool(
        vectors, vectors[[int(name.split()[1]) for name in names]], {t: i for i, t in enumerate(names)}
    )
    rows = own_rows(pools, [embedded, embedded], [])
    assert len(rows) == 12
    assert {row[0].split()[0] for row in rows} == {"en", "sw"}
    assert all("own image: number 1 of 10" in row[1] for row in rows)
    assert all(row[2][0][1] and not any(right for _, right in row[2][1:]) for row in rows)
    assert all(f"(en {row[0].split()[1]})" in row[1] for row in rows if row[0].startswith("sw"))
