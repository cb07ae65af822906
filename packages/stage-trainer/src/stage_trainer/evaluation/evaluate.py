"""Evaluates a model on held-out data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation import text_retrieval
from stage_trainer.evaluation.held_out import HeldOut, find
from stage_trainer.evaluation.retrieval import K, Pool, cut_texts, embed, embed_texts, ndcg, score
from stage_trainer.evaluation.tables import Figures, Pools, Stored, joined
from stage_trainer.metrics.quantization import check_precision
from stage_trainer.metrics.rescoring import stored_as
from stage_trainer.recipe.limits import MAX_PIXELS


def evaluate(
    model_directory: str | Path,
    data: str | Path,
    say: Callable[[str], None],
    *,
    max_pixels: int = MAX_PIXELS,
    precisions: Sequence[str] = (),
) -> Pools:
    """Evaluates a model on every data set at `data`.

    Args:
        say: called with messages on the progress, and on what is not measured.
        max_pixels: data with larger images are refused.
        precisions: in which candidates are stored as well, beside float32 and from the same embeddings.

    Raises:
        UserError: there is nothing to measure, the model or the data cannot be read, or a pool's vectors cannot be
            stored like that.
    """
    found = find(data)
    model = DualEncoder.from_pretrained(model_directory)
    dims = sorted({*(model.matryoshka_dims or ()), model.text.config.output_width}, reverse=True)
    for precision, dim in product(precisions, dims):
        check_precision(precision, dim)
    say(joined(f"measuring on {found.where}:", [f"{s.kind}/{s.directory.name}" for s in found.sets]))
    figures: Pools = {}
    for held_out in found.sets:
        if held_out.images:
            pool = Pool.open(held_out.directory, max_pixels)
            measured = _of_images(model, held_out, pool, (dims, precisions), say)
        else:
            measured = _of_texts(model, held_out, (dims, precisions), say)
        if measured:
            figures[held_out.name] = {"kind": held_out.kind, "folder": str(held_out.directory), **measured}
    if not figures:
        raise UserError(f"{data} has nothing to measure; give a folder with images and captions, or with text pairs")
    return figures


def _of_images(
    model: DualEncoder,
    held_out: HeldOut,
    pool: Pool,
    at: tuple[list[int], Sequence[str]],
    say: Callable[[str], None],
) -> Figures:
    dims, precisions = at
    say(f"{held_out.name}: {len(pool.images):,} images, {len(pool.all_texts()):,} texts …")
    _say_cut(model, pool.all_texts(), held_out.name, say)
    embedded = embed(model, pool)
    recalls, chances = score(pool, embedded, dims)
    stored: dict[str, Stored] = {}
    for precision in precisions:
        with _named(held_out.name, precision):
            found = score(pool, embedded, dims, stored_as(precision, K))[0]
            stored[precision] = {"recall_at_5": {d: v for d, v in found.items() if v}}
            if pool.documents:
                stored[precision]["ndcg_at_5"] = ndcg(pool, embedded, dims, index=stored_as(precision, K))
    return {
        "images": len(pool.images),
        "texts": {language: len(entries) for language, entries in pool.texts.items()},
        "recall_at_5": {d: v for d, v in recalls.items() if v},
        "chance": {d: v["chance"] for d, v in chances.items() if v},
        **({"ndcg_at_5": ndcg(pool, embedded, dims)} if pool.documents else {}),
        **({"stored": stored} if stored else {}),
    }


def _of_texts(
    model: DualEncoder, held_out: HeldOut, at: tuple[list[int], Sequence[str]], say: Callable[[str], None]
) -> Figures:
    dims, precisions = at
    pool = text_retrieval.PairPool.open(held_out.directory)
    if not pool.queries:
        say(f"{held_out.name} is not measured: it has no pair of two texts that differ")
        return {}
    texts = pool.texts()
    say(f"{held_out.name}: {len(texts):,} texts …")
    _say_cut(model, texts, held_out.name, say)
    vectors = embed_texts(model, texts)
    figures: Figures = {"targets": len(pool.targets), "ndcg_at_10": {}}
    for dim in dims:
        looked_up = text_retrieval.lookup(texts, vectors[:, :dim])
        measured = text_retrieval.measure(pool, looked_up)
        if "spearman" in measured:
            figures.setdefault("spearman", {})[str(dim)] = measured.pop("spearman")
        figures["ndcg_at_10"][str(dim)] = _by_language(measured)
        for precision in precisions:
            with _named(held_out.name, precision):
                found = text_retrieval.measure(pool, looked_up, stored_as(precision, text_retrieval.K))
            of = figures.setdefault("stored", {}).setdefault(precision, {"ndcg_at_10": {}})
            of["ndcg_at_10"][str(dim)] = _by_language(found)
    return figures


def _by_language(measured: dict[str, float]) -> dict[str, float]:
    start = "ndcg_at_10/"
    return {name.removeprefix(start): value for name, value in measured.items() if name.startswith(start)}


@contextmanager
def _named(pool: str, precision: str) -> Iterator[None]:
    """Says of which pool vectors cannot be stored."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{pool} cannot be measured in {precision}: {error}") from error


def _say_cut(model: DualEncoder, texts: Sequence[str], name: str, say: Callable[[str], None]) -> None:
    cut, longest = cut_texts(model, texts)
    if cut:
        say(f"{name}: {cut:,} of its {len(texts):,} texts are longer than {longest} tokens; their ends are cut off")
