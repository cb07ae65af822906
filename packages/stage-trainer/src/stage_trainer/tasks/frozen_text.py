"""Runs a text tower that does not train over all texts of a stage's data, once, and keeps what it gives on the disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data_prep.shards import ShardError, ShardUnavailable, texts_in
from text_tower import PackedTokens, TextTower
from text_tower.projector import without_projector

from stage_trainer.data.batches import StageBatches
from stage_trainer.data.frozen_texts import FrozenTexts
from stage_trainer.data.samples import texts_of
from stage_trainer.data.sections import shortened
from stage_trainer.data.stored_vectors import StoredVectors, digest_of
from stage_trainer.errors import UserError
from stage_trainer.recipe import Stage
from stage_trainer.tasks.frozen_tower import Phase, make_missing

CHUNK = 64
"""Texts of one forward pass."""
_OF_NO_INFLUENCE = (
    "max_length", "instructions", "truncate_dim", "checkpointing", "attention", "compile", "projector",
    "projector_hidden",
)  # fmt: skip


class _Reader(NamedTuple):
    """What reads texts, and how: the batches have the tokenizer."""

    tower: TextTower
    batches: StageBatches
    max_tokens: int
    precision: str
    phase: Phase


def keep_texts(tower: TextTower, batches: StageBatches, stage: Stage, precision: str, phase: Phase) -> None:
    """Gives batches the tower's embeddings, before a projector, in the place of texts; those that are not on the disk
    yet are made, by all ranks together, every one of which has to call.

    Args:
        tower: on its device.
        phase: entered for each pass.

    Raises:
        UserError: the tower has dropout, so that it says something else at each draw of a text.
    """
    assert stage.embedding_cache is not None
    if tower.config.dropout:
        raise UserError(
            "'embedding_cache' keeps the embeddings of texts that never change, and model.text.dropout is "
            f"{tower.config.dropout:g}; set it to 0"
        )
    config = {name: value for name, value in asdict(tower.config).items() if name not in _OF_NO_INFLUENCE}
    origin = {
        "weights": digest_of(without_projector(tower.state_dict()), config),
        "tokenizer": batches.tokenizer.fingerprint,
        "max_tokens": stage.max_tokens,
        "precision": precision,
    }
    of_tasks = ((batches.indexed_images, "captions"), (batches.text_sources, "texts"))
    sources = {data.directory: data for found, what in of_tasks if stage.reads(what) for data in found}
    frozen = FrozenTexts(Path(stage.embedding_cache).expanduser(), sources.values(), origin)
    reader = _Reader(tower, batches, stage.max_tokens, precision, phase)
    make_missing(frozen.stores, batches, "text", lambda store, n: _shard(reader, store, n), phase)
    batches.frozen_texts = frozen


def _shard(
    reader: _Reader, store: StoredVectors, number: int
) -> tuple[np.ndarray, dict[int, str], dict[int, list[int]]]:
    """Embeddings `[n, V, D]` of the texts of a shard's samples, V of the one that has most; which samples are unusable,
    and which texts of each are cut."""
    data, samples = store.data, store.data.samples_of(number)
    unusable: dict[int, str] = {}
    texts: dict[int, list[str]] = {}
    for place, index in enumerate(samples):
        try:
            content = texts_of(data, index, data.read(index))
        except ShardUnavailable as error:  # it may be there tomorrow: nothing is written that says otherwise
            raise UserError(str(error)) from error
        except ShardError as error:
            unusable[place] = str(error)
            continue
        texts[place] = [text["text"] for _, alternatives in texts_in(data.kind, content) for text in alternatives]
    different = list(dict.fromkeys(text for found in texts.values() for text in found))
    tokens = dict(
        zip(different, reader.batches.tokenizer(different, max_length=None) if different else [], strict=True)
    )
    rows = _embedded(reader, {text: shortened(ids, reader.max_tokens) for text, ids in tokens.items()})
    most = max((len(found) for found in texts.values()), default=1)
    vectors = np.zeros((len(samples), most, reader.tower.config.width), np.float32)
    for place, found in texts.items():
        vectors[place, : len(found)] = [rows[text] for text in found]
    long = {text for text, ids in tokens.items() if len(ids) > reader.max_tokens}
    cut = {place: which for place, found in texts.items() if (which := [n for n, t in enumerate(found) if t in long])}
    return vectors, unusable, cut


@torch.no_grad()
def _embedded(reader: _Reader, tokens: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """{text: its embedding, `[D]`}, of texts with their tokens."""
    order = sorted(tokens, key=lambda text: len(tokens[text]))  # those of one length are one call
    device = next(reader.tower.parameters()).device
    rows: dict[str, np.ndarray] = {}
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        packed = PackedTokens.from_lists([tokens[text] for text in chunk]).to(device)
        with reader.phase(), torch.autocast(device.type, torch.bfloat16, enabled=reader.precision == "bf16"):
            made = reader.tower.pooled(packed).float().cpu().numpy()
        rows |= dict(zip(chunk, made, strict=True))
    return rows
