"""The page of `stage-trainer demo`: a collection, searched by a text or an image in a browser."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from data_prep.shards import ShardError
from vision_tower import ImageError, load_image

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.pages.collection import Collection, Hit, content_of, label_of
from stage_trainer.pages.gallery import thumbnail

WHAT = {"images": ("image",), "texts": ("text",), "images and texts": ("image", "text")}
_MOST = 60  # found
_CSS = """
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 14px; }
.hit { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; min-width: 0;
  background: var(--block-background-fill); }
.hit img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; }
.hit .text { padding: 14px; font-size: 15px; line-height: 1.45; overflow-wrap: anywhere; }
.nearest { margin: 4px 2px 12px; opacity: .75; overflow-wrap: anywhere; }
.hit .about { padding: 6px 12px 9px; font-size: 12px; opacity: .7; overflow-wrap: anywhere; }
"""


class Searcher:
    """A model and what it searches.

    Args:
        max_pixels: a query's image with more is refused.
    """

    def __init__(self, model: DualEncoder, collection: Collection, max_pixels: int):
        self.model, self.collection, self.max_pixels = model, collection, max_pixels
        self.width = model.text.config.output_width

    def kinds(self) -> list[str]:
        """What can be asked for: of what the collection has."""
        return [name for name, kinds in WHAT.items() if all(self.collection.count(kind) for kind in kinds)]

    def search(self, text: str, image: str | None, dim: float, what: str, most: float) -> list[Hit]:
        """What is nearest to an image, or, without one, to a text.

        Args:
            image: a file's path.
            dim: 1 to the model's width.
            what: of `WHAT`.

        Raises:
            UserError: there is no query, or one of these is out of its range.
            ImageError: the image cannot be used.
        """
        if not 1 <= dim <= self.width or dim != int(dim):
            raise UserError(f"the dim is {dim:g}; expected a whole number from 1 to {self.width}")
        if not 1 <= most <= _MOST or most != int(most):
            raise UserError(f"{most:g} are asked for; expected a whole number from 1 to {_MOST}")
        if what not in self.kinds():
            raise UserError(f"{what!r} cannot be searched here; expected {' or '.join(map(repr, self.kinds()))}")
        return self.collection.search(self._embed(text, image), WHAT[what], int(dim), int(most))

    def _embed(self, text: str, image: str | None) -> np.ndarray:
        if image:
            picture = load_image(image, max_pixels=self.max_pixels, name="the image")
            found: np.ndarray = self.model.encode_image([picture])[0]
            return found
        if not (text or "").strip():
            raise UserError("write some words, or give an image")
        found = self.model.encode_text([text], max_length=512)[0]
        return found


def cards(hits: list[Hit], query: str) -> str:
    """What was found for a query, as HTML; whatever texts and names hold, it is shown as letters."""
    heading = f'<div class="nearest" dir="auto">nearest to {html.escape(query)}</div>'
    return f'{heading}<div class="hits">{"".join(map(_card, hits))}</div>'


def _card(hit: Hit) -> str:
    label = html.escape(label_of(hit.entry))
    if hit.entry.kind == "text":
        return (
            f'<div class="hit"><div class="text" dir="auto">{label}</div><div class="about">{hit.score:.3f}</div></div>'
        )
    try:
        shown = f'<img src="{thumbnail(content_of(hit.entry))}" alt="{label}">'
    except (ImageError, ShardError, OSError) as error:  # it was there when it was embedded
        shown = f'<div class="text">{html.escape(str(error))}</div>'
    return f'<div class="hit">{shown}<div class="about">{hit.score:.3f} · {label}</div></div>'


def gradio_needed() -> Any:
    """The module gradio. UserError if it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # or it calls home
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the demo needs gradio 6 ({error}): pip install 'gradio>=6', the trainer with its extra `demo`, or, in a "
            "checkout, bash launch/demo.sh in place of stage-trainer demo"
        ) from error
    return gradio


def page_of(searcher: Searcher, title: str, dims: tuple[int, ...] | None) -> Any:
    """The page, `gradio.Blocks`; `dims` are those that the model was trained for."""
    gr = gradio_needed()
    counts = [f"{searcher.collection.count(kind):,} {kind}s" for kind in ("image", "text")]
    kinds = searcher.kinds()
    trained = f"trained to be cut to {', '.join(map(str, dims))}" if dims else "not trained to be cut"

    def search(text: str, image: str | None, dim: float, what: str, most: float) -> tuple[str, list[dict[str, Any]]]:
        try:
            hits = searcher.search(text, image, dim, what, most)
        except (UserError, ImageError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        found = [{"kind": h.entry.kind, "id": h.entry.id, "label": label_of(h.entry), "score": h.score} for h in hits]
        return cards(hits, "the image" if image else f"“{text}”"), found

    with gr.Blocks(title=f"{title} · search", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nSearches {' and '.join(counts)}, by a text in any language or by an image.")
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(label="Text", placeholder="in any language", autofocus=True)
                with gr.Row():
                    what = gr.Radio(kinds, value=kinds[0], label="Search", info="together: ranked by one score")
                    dim = gr.Slider(1, searcher.width, value=searcher.width, step=1, label="Dims", info=trained)
                    most = gr.Slider(1, _MOST, value=24, step=1, label="Results")
                ask = gr.Button("Search", variant="primary")
            with gr.Column(scale=1):
                image = gr.Image(label="or an image", type="filepath", sources=["upload", "clipboard"], height=220)
        # Gradio has checked that it is an upload; what is in it is ours to open and to refuse in one line.
        image.preprocess = lambda upload: upload.path if upload else None
        found = gr.HTML()
        rows = gr.JSON(visible=False)
        asked = {"inputs": [text, image, dim, what, most], "outputs": [found, rows]}
        gr.on([ask.click, text.submit, image.upload], search, **asked, api_name="search")
    return page


def serve(page: Any, host: str, port: int, opened: Callable[[str], None]) -> None:
    """Serves the page until this process is interrupted; `opened` is called with its address.

    Raises:
        UserError: the port is taken.
    """
    gr = gradio_needed()
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="stone", font=["system-ui", "sans-serif"],
                           font_mono=["ui-monospace", "monospace"])  # fmt: skip
    try:
        page.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
            show_error=True,
            max_file_size="32mb", footer_links=["api"], theme=theme, css=_CSS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be served ({error}); name another --port") from error
    try:
        opened(page.local_url)
        page.block_thread()
    finally:
        page.close(verbose=False)


def title_of(model: Path) -> str:
    """What the page calls the model: its folder, or its name on a hub."""
    parts = [part for part in model.parts if part != "model"]
    return "/".join(parts[-2:]) if parts and parts[-1].startswith("step-") else (parts[-1] if parts else "model")
