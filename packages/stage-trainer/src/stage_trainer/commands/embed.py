"""`stage-trainer embed`: makes what a stage reads from the disk instead of computing it at every step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_trainer.commands.common import add_recipe, add_settings, say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from stage_trainer.data.stored_vectors import StoredVectors
    from stage_trainer.data.taught_texts import TaughtTexts
    from stage_trainer.evaluation.models import Embedder
    from stage_trainer.recipe import Recipe, Stage

CHUNK = 256
"""Texts that a teacher gets at once."""
_DOES = """What a stage reads from the disk: the embeddings of a frozen image tower (`embedding_cache`), and what a
teacher says of texts (`teacher`). What is there already stays: after an interruption the same command goes on."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "embed", help="make the embeddings that a stage reads from the disk, before it is trained", description=_DOES
    )
    add_recipe(p)
    p.add_argument("--stage", type=int, required=True, help="the stage's number, from 1")
    add_settings(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load

    recipe, number = load(arguments.recipe, arguments.settings, arguments.stage).recipe, arguments.stage
    stage = recipe.stage(number)
    if stage.embedding_cache is None and stage.teacher is None:
        raise UserError(
            f"{recipe.name}: stage {number} reads no embeddings from the disk; name a folder for those of a frozen "
            "image tower as embedding_cache, or a model to learn from as teacher"
        )
    say("loading PyTorch …")
    if stage.teacher is not None:
        _ask_teacher(recipe, number)
    if stage.embedding_cache is not None:
        _run_tower(recipe, number)
    print(f"everything that stage {number} reads from the disk is there")


def _run_tower(recipe: Recipe, number: int) -> None:
    """The frozen image tower over the stage's images, at each of its resolutions, as the stage itself would."""
    import torch

    from stage_trainer.build import load_tokenizer
    from stage_trainer.checkpoint.resume import settings, starting_point
    from stage_trainer.checkpoint.state import RunState
    from stage_trainer.run.device import uses_gpu
    from stage_trainer.run.environment import native_precision, quiet, set_threads, versions
    from stage_trainer.run.rendezvous import initialize_distributed
    from stage_trainer.tasks import make_task

    quiet()
    cuda = uses_gpu(recipe.device, recipe.precision, say)
    rank, world, device = initialize_distributed(recipe.output, cuda=cuda, recipe={"embed": number})
    set_threads(world)
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=native_precision(device))
    task = make_task(recipe, number)
    torch.manual_seed(task.seed)
    task.check_configs(fetch=True)
    tokenizer = load_tokenizer(recipe)
    batches = task.make_batches(tokenizer, rank, world)
    state = RunState(settings(recipe, number), batches.fingerprint, versions())
    model, _ = starting_point(task, state, tokenizer)
    step = min(state.step, task.stage.steps - 1)
    while step < task.stage.steps:
        step = task.set_up_segment(model.cpu(), step, None)  # where training resamples, whose bits these have to be
        model.to(device)
        task.prepare(model, batches, device, contextlib.nullcontext)


def check_teacher(recipe: Recipe, number: int) -> None:
    """UserError if the stage's teacher is here and is not the one whose embeddings are on the disk. Training can do
    without it: where it is not, they stand for it."""
    from stage_trainer.commands.common import find_model
    from stage_trainer.evaluation.foreign_models import library_of
    from stage_trainer.files import fingerprint_of

    stage = recipe.stage(number)
    if stage.teacher is None or not (model := Path(stage.teacher.model)).exists():
        return
    maker = _maker(fingerprint_of(find_model(model)[0] if library_of(model) is None else model), stage)
    for store in _taught(recipe, stage).stores.values():
        store.check_maker(maker)


def _maker(weights: str, stage: Stage) -> dict[str, object]:
    return {"weights": weights, "max_tokens": stage.max_tokens}


def _taught(recipe: Recipe, stage: Stage) -> TaughtTexts:
    """The stage's text data with what the teacher says of them, whose texts are not kept."""
    from stage_trainer.data.config import DataConfig
    from stage_trainer.data.remote_data import place
    from stage_trainer.data.samples import SampleCache, open_data_set
    from stage_trainer.data.taught_texts import TaughtTexts

    assert stage.teacher is not None
    config = DataConfig.of(recipe)
    paths = dict.fromkeys(source.path for source in stage.data.text)
    sources = [open_data_set(place(config, "train", path), ("text-",), check=False) for path in paths]
    return TaughtTexts(stage.teacher, sources, SampleCache(0, config.max_pixels))


def _ask_teacher(recipe: Recipe, number: int) -> None:
    """What the teacher says of each sample of the stage's text data."""
    from stage_trainer.commands.any_model import check_any, open_any
    from stage_trainer.data.samples import shard_errors_explained
    from stage_trainer.evaluation.models import Asked

    stage = recipe.stage(number)
    assert stage.teacher is not None
    taught = _taught(recipe, stage)
    for store in taught.stores.values():
        with shard_errors_explained():
            store.data.check()
    check_any(Path(stage.teacher.model))
    device = "cpu" if recipe.device == "cpu" else None
    teacher = open_any(Path(stage.teacher.model), Asked(max_length=stage.max_tokens, device=device))
    for store in taught.stores.values():
        store.note_maker(_maker(teacher.fingerprint, stage))
        for shard in range(len(store.data.shard_sizes)):
            if store.damaged(shard):
                say(f"{teacher.name}: shard {shard + 1} of {len(store.data.shard_sizes)} of {store.data.directory}")
                store.write(shard, *_said(teacher, store, shard, taught))


def _said(
    teacher: Embedder, store: StoredVectors, shard: int, taught: TaughtTexts
) -> tuple[np.ndarray, dict[int, str]]:
    """The vectors `[n, 1, D]` of a shard's samples, and why some have none."""
    import numpy as np
    from data_prep.shards import ShardError, ShardUnavailable

    from stage_trainer.data.taught_texts import read_by_teacher

    samples, language = store.data.samples_of(shard), taught.teacher.language
    texts: dict[int, str] = {}
    unusable: dict[int, str] = {}
    for row, index in enumerate(samples):
        try:
            content: dict[str, Any] = taught.cache.sample(store.data, index)[1]
        except ShardUnavailable as error:  # it may be there tomorrow: nothing is written that says otherwise
            raise UserError(str(error)) from error
        except ShardError as error:
            unusable[row] = str(error)
            continue
        if (text := read_by_teacher(content, language)) is not None:
            texts[row] = text
        else:
            name = store.data.row(index).key
            unusable[row] = (
                f"{store.data.directory}: sample {name} has no text in {language!r}, which the teacher reads"
            )
    if not texts:
        raise UserError(
            f"no sample of shard {shard} of {store.data.directory} can be read by the teacher, the last one because: "
            f"{unusable[len(samples) - 1]}"
        )
    rows = list(texts)
    found = [teacher.embed_texts([texts[r] for r in rows[i : i + CHUNK]]) for i in range(0, len(rows), CHUNK)]
    vectors = np.zeros((len(samples), 1, found[0].shape[1]), np.float32)
    vectors[rows, 0] = np.concatenate(found)
    return vectors, unusable
