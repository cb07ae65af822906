"""What a stage's teacher says of its text data, onto the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stage_trainer.commands.common import say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from stage_trainer.data.stored_vectors import StoredVectors
    from stage_trainer.data.taught_texts import TaughtTexts
    from stage_trainer.recipe import Recipe, Stage

CHUNK = 256
"""Samples that a teacher gets at once."""


class Teacher(NamedTuple):
    """A model that says something of samples.

    Attributes:
        name: as the recipe has it.
        fingerprint: the hash of its weights and configuration.
        say: float32 `[n, T]` of n questions (`TaughtTexts.question`).
    """

    name: str
    fingerprint: str
    say: Callable[[Sequence[Any]], np.ndarray]


def ask_teacher(recipe: Recipe, stage: Stage) -> None:
    """Writes what the teacher says of each sample of the stage's text data, where it is not there already."""
    from stage_trainer.data.samples import shard_errors_explained

    taught = _taught(recipe, stage)
    for store in taught.stores.values():
        with shard_errors_explained():
            store.data.check()
    teacher = _teacher(recipe, stage)
    for store in taught.stores.values():
        store.note_maker(taught.maker(teacher.fingerprint, stage.max_tokens))
        for shard in range(len(store.data.shard_sizes)):
            if store.damaged(shard):
                say(f"{teacher.name}: shard {shard + 1} of {len(store.data.shard_sizes)} of {store.data.directory}")
                store.write(shard, *_said(teacher, store, shard, taught))


def check_teacher(recipe: Recipe, number: int) -> None:
    """UserError if the stage's teacher is here and is not the one whose words are on the disk. Training can do without
    it: where it is not, they stand for it."""
    from stage_trainer.commands.common import find_model
    from stage_trainer.evaluation.foreign_models import library_of
    from stage_trainer.files import fingerprint_of

    stage = recipe.stage(number)
    teacher = stage.teacher
    if teacher is None or teacher.model is None or not (model := Path(teacher.model)).exists():
        return
    ours = not teacher.scores and library_of(model) is None
    fingerprint = fingerprint_of(find_model(model)[0] if ours else model)
    taught = _taught(recipe, stage)
    for store in taught.stores.values():
        store.check_maker(taught.maker(fingerprint, stage.max_tokens))


def _taught(recipe: Recipe, stage: Stage) -> TaughtTexts:
    """The stage's text data with what the teacher says of them, whose texts are not kept."""
    from stage_trainer.data.config import DataConfig
    from stage_trainer.data.opening import open_data_set
    from stage_trainer.data.remote_data import place
    from stage_trainer.data.samples import SampleCache
    from stage_trainer.data.scored_texts import ScoredTexts
    from stage_trainer.data.taught_texts import TaughtTexts

    assert stage.teacher is not None
    config = DataConfig.of(recipe)
    paths = dict.fromkeys(source.path for source in stage.data.text)
    sources = [open_data_set(place(config, "train", path), ("text-",), check=False) for path in paths]
    kind = ScoredTexts if stage.teacher.scores else TaughtTexts
    return kind(stage.teacher, sources, SampleCache(0, config.max_pixels))


def _teacher(recipe: Recipe, stage: Stage) -> Teacher:
    """Loads it."""
    from stage_trainer.commands.any_model import check_any, open_any
    from stage_trainer.evaluation.cross_encoder import CrossEncoder
    from stage_trainer.evaluation.models import Asked

    assert stage.teacher is not None
    assert stage.teacher.model is not None
    name, device = stage.teacher.model, "cpu" if recipe.device == "cpu" else None
    if stage.teacher.scores:
        scorer = CrossEncoder(name, device)
        return Teacher(name, scorer.fingerprint, scorer.scores)
    check_any(Path(name))
    model = open_any(Path(name), Asked(max_length=stage.max_tokens, device=device))
    return Teacher(model.name, model.fingerprint, model.embed_texts)


def _said(teacher: Teacher, store: StoredVectors, shard: int, taught: TaughtTexts) -> tuple[np.ndarray, dict[int, str]]:
    """The vectors `[n, 1, T]` of a shard's samples, and why some have none."""
    import numpy as np
    from data_prep.shards import ShardError, ShardUnavailable, Unusable

    samples = store.data.samples_of(shard)
    questions: dict[int, Any] = {}
    unusable: dict[int, str] = {}
    for row, index in enumerate(samples):
        try:
            questions[row] = taught.question(store.data, taught.cache.sample(store.data, index)[1])
        except ShardUnavailable as error:  # it may be there tomorrow: nothing is written that says otherwise
            raise UserError(str(error)) from error
        except Unusable as error:
            unusable[row] = f"{store.data.directory}: sample {store.data.row(index).key} has {error}"
        except ShardError as error:
            unusable[row] = str(error)
    if not questions:
        raise UserError(
            f"no sample of shard {shard} of {store.data.directory} can be read by the teacher, the last one because: "
            f"{unusable[len(samples) - 1]}"
        )
    rows = list(questions)
    found = [teacher.say([questions[r] for r in rows[i : i + CHUNK]]) for i in range(0, len(rows), CHUNK)]
    vectors = np.zeros((len(samples), 1, found[0].shape[1]), np.float32)
    vectors[rows, 0] = np.concatenate(found)
    return vectors, unusable
