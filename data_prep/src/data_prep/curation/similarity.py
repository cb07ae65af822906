"""Keeps captions that fit their image, by a trained model's similarity: above a threshold, or the best share."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.curation import passes
from data_prep.curation.phash import UNREADABLE
from data_prep.errors import UserError, needs
from data_prep.execute import Execution, Output, Target
from data_prep.images import STORED
from data_prep.shards.format import JsonObject

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], tuple[np.ndarray, np.ndarray]]
_IMAGES_AT_A_TIME = 32
_BLANK = Image.new("RGB", (8, 8))


def filter_by_similarity(
    directories: Sequence[str],
    target: Target,
    *,
    model: str,
    threshold: float | None = None,
    top: float | None = None,
    dim: int | None = None,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Write the data sets to `target` with the captions that fit their image.

    Args:
        model: a directory that `stage-trainer export` or `DualEncoder.save_pretrained` wrote, or
            "open_clip:ARCHITECTURE:WEIGHTS", where WEIGHTS is a name that open_clip knows or a file.
        threshold: captions of at least this cosine similarity stay.
        top: alternatively, the most similar captions of each language, this share of them.
        dim: compare the first `dim` dims only (of a model of ours).

    Raises:
        UserError: not exactly one of `threshold` and `top`, no such model, or its library is not installed.
    """
    if (threshold is None) == (top is None):
        raise UserError("give either --threshold or --top")
    if top is not None and not 0 < top <= 1:
        raise UserError(f"--top {top}: expected a share above 0 and up to 1")
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: a cosine similarity, expected -1 to 1")
    if dim is not None and dim < 1:
        raise UserError(f"--dim {dim}: expected at least 1")
    datasets = passes.open_alike(directories)
    if not datasets[0].kind.startswith("image"):
        raise UserError(f"{datasets[0].directory} holds {datasets[0].kind}; expected images with captions")
    model = model if model.startswith("open_clip:") else str(Path(model).resolve())
    scoring = {"model": model, "dim": dim}
    survey = passes.Survey(target, f"{__name__}:score", passes.pieces_of(datasets), scoring)
    rules = {**scoring, "threshold": threshold, "top": top}
    job = passes.job_on(datasets, target, "similarity", f"{__name__}:cut", rules, survey)

    def decide(survey: passes.Survey) -> list[dict[str, np.ndarray]]:
        found = [passes.load(file) for file in survey.files()]
        kept = keep([part["scores"] for part in found], [part["languages"] for part in found], threshold, top)
        return [{"values": values} for values in kept]

    return passes.two_passes(survey, job, decide, execution)


def keep(
    scores: Sequence[np.ndarray], languages: Sequence[np.ndarray], threshold: float | None, top: float | None
) -> list[np.ndarray]:
    """Which captions stay, a bool array for each array of scores.

    With `top`, of a language's n captions the ceil(top · n) most similar stay; of equal ones, the earlier. Captions
    with the score -inf, whose image cannot be decoded, are never kept.
    """
    every = np.concatenate(list(scores))
    if threshold is not None:
        kept = every >= threshold
    else:
        assert top is not None
        language = np.concatenate(list(languages))
        kept = np.zeros(len(every), bool)
        for one in np.unique(language):
            places = np.flatnonzero(language == one)
            best = np.argsort(-every[places], kind="stable")[: int(np.ceil(round(top * len(places), 9)))]
            kept[places[best]] = True
    kept &= every > -np.inf
    return np.split(kept, np.cumsum([len(part) for part in scores])[:-1])


def score(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: the similarity of each caption to its image, and its language, in the order of the samples."""
    scorer = _scorer(options["model"], options["dim"])
    scores: list[np.ndarray] = []
    languages: list[str] = []
    samples = passes.samples_of(piece)
    while batch := list(itertools.islice(samples, _IMAGES_AT_A_TIME)):
        output.came_in(len(batch))
        texts = [caption["text"] for sample in batch for caption in sample.content["captions"]]
        owners = np.repeat(np.arange(len(batch)), [len(sample.content["captions"]) for sample in batch])
        languages += [caption["language"] for sample in batch for caption in sample.content["captions"]]
        if texts:
            found = [_image(sample) for sample in batch]
            images, captions = scorer([image or _BLANK for image in found], texts)
            readable = np.array([image is not None for image in found])
            scores.append(np.where(readable[owners], (images[owners] * captions).sum(axis=1), -np.inf))
    passes.save(
        Path(piece["survey"]),
        scores=np.concatenate([np.zeros(0, np.float32), *scores]).astype(np.float32),
        languages=np.array(languages, "U8"),
    )


def cut(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The rewriting pass."""
    kept = iter(passes.decision(piece)["values"].tolist())
    for sample in passes.samples_of(piece):
        output.came_in()
        captions, words = sample.content["captions"], sample.words
        place = f"{piece['dataset']}: {sample.row.key}"
        stay = []
        for caption in captions:
            if next(kept):
                stay.append(caption)
            else:
                output.mention("caption that does not fit the image", place, content=caption["text"])
        output.note("captions out", len(captions) - len(stay))
        if stay:
            sample.content["captions"] = stay
            passes.write(output, piece, sample, tokens=sample.row.tokens if len(stay) == len(captions) else None)
        else:
            output.drop("no caption fits the image", place, content=words)


def _image(sample: passes.Sample) -> Image.Image | None:
    """Its image; None if it cannot be decoded."""
    try:
        return Image.open(io.BytesIO(sample.image), formats=STORED).convert("RGB")
    except UNREADABLE:
        return None


@functools.lru_cache(1)
def _scorer(model: str, dim: int | None) -> Scorer:
    """(images, texts) → unit rows of both, float32."""
    if model.startswith("open_clip:"):
        return _open_clip(model)
    return _dual_encoder(Path(model), dim)


def _dual_encoder(folder: Path, dim: int | None) -> Scorer:
    if not (folder / "text").is_dir() or not (folder / "vision").is_dir():
        raise UserError(f"{folder} has no text/ and vision/; expected a directory written by `stage-trainer export`")
    needs("text_tower", extra="models", what="scoring with a model of ours")
    needs("vision_tower", extra="models", what="scoring with a model of ours")
    from text_tower import TextTower
    from vision_tower import VisionTower

    try:
        text, vision = TextTower.from_pretrained(folder / "text"), VisionTower.from_pretrained(folder / "vision")
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load {folder}: {error}") from error

    def both(images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return vision.encode(images, truncate_dim=dim), text.encode(texts, truncate_dim=dim)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error

    return both


def _open_clip(name: str) -> Scorer:
    parts = name.split(":", 2)
    if len(parts) != 3:
        raise UserError(f"--model {name}: expected open_clip:ARCHITECTURE:WEIGHTS")
    open_clip = needs("open_clip", extra="open-clip", what="scoring with an open_clip model")
    import torch

    try:
        model, _, prepare = open_clip.create_model_and_transforms(parts[1], pretrained=parts[2] or None)
        tokenize = open_clip.get_tokenizer(parts[1])
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{name}: open_clip cannot make it ({error})") from error
    model.eval()

    @torch.no_grad()
    def both(images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pixels = torch.stack([prepare(image) for image in images])
        return (
            model.encode_image(pixels, normalize=True).float().numpy(),
            model.encode_text(tokenize(list(texts)), normalize=True).float().numpy(),
        )

    return both
