"""What a stage's teacher says of its data, onto the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stage_trainer.commands.common import say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from data_prep.shards import Dataset

    from stage_trainer.data.stored_vectors import StoredVectors
    from stage_trainer.data.taught import Said
    from stage_trainer.recipe import Recipe, Source, Stage

CHUNK = 256
"""Questions that a teacher gets at once."""


class Teacher(NamedTuple):
    """A model that says something of samples.

    Attributes:
        name: as the recipe has it.
        fingerprint: the hash of its weights and configuration.
        answers: by what it says something of (`Said.of`): float32 `[n, T]` of n questions, which come in parts.
    """

    name: str
    fingerprint: str
    answers: Mapping[str, Callable[[Iterator[Sequence[Any]]], np.ndarray]]


def ask_teacher(recipe: Recipe, stage: Stage) -> None:
    """Writes what the teacher says of each sample of the stage's data, where it is not there already."""
    from stage_trainer.data.samples import shard_errors_explained

    kinds = _said(recipe, stage)
    for said in kinds:
        for store in said.stores.values():
            with shard_errors_explained():
                store.data.check()
    teacher = _teacher(recipe, stage)
    for said in kinds:
        for store in said.stores.values():
            store.note_maker(said.maker(teacher.fingerprint, stage.max_tokens))
            for shard in range(len(store.data.shard_sizes)):
                if store.damaged(shard):
                    of = f"shard {shard + 1} of {len(store.data.shard_sizes)} of {store.data.directory}"
                    say(f"{teacher.name}: {said.of} of {of}")
                    store.write(shard, *_answers(teacher, store, shard, said))


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
    for said in _said(recipe, stage):
        for store in said.stores.values():
            store.check_maker(said.maker(fingerprint, stage.max_tokens))


def _said(recipe: Recipe, stage: Stage) -> tuple[Said, ...]:
    """What the teacher says of the stage's data, whose samples are not kept."""
    from stage_trainer.data.config import DataConfig
    from stage_trainer.data.opening import open_data_set
    from stage_trainer.data.remote_data import place
    from stage_trainer.data.samples import SampleCache
    from stage_trainer.data.teachers import said

    assert stage.teacher is not None
    config, teacher = DataConfig.of(recipe), stage.teacher

    def opened(task: str, sources: Sequence[Source], kinds: tuple[str, ...]) -> list[Dataset]:
        paths = dict.fromkeys(source.path for source in sources if teacher.teaches(task))
        return [open_data_set(place(config, "train", path), kinds, check=False) for path in paths]

    texts = opened("text", stage.data.text, ("text-",))
    images = opened("image_text", stage.data.image_text, ("image-",))
    return said(teacher, texts, images, SampleCache(0, config.max_pixels))


def _teacher(recipe: Recipe, stage: Stage) -> Teacher:
    """Loads it."""
    import numpy as np

    from stage_trainer.commands.any_model import check_any, open_any
    from stage_trainer.evaluation.cross_encoder import CrossEncoder
    from stage_trainer.evaluation.models import Asked

    assert stage.teacher is not None
    assert stage.teacher.model is not None
    name, device = stage.teacher.model, "cpu" if recipe.device == "cpu" else None
    if stage.teacher.scores:
        scorer = CrossEncoder(name, device)
        scores = {"texts": lambda parts: np.concatenate([scorer.scores(part) for part in parts])}
        return Teacher(name, scorer.fingerprint, scores)
    check_any(Path(name))
    asked = Asked(max_length=stage.max_tokens, device=device, max_pixels=recipe.max_pixels)
    model = open_any(Path(name), asked)
    if "images" in stage.teacher.of and not model.sees:
        raise UserError(
            f"the teacher {name} has no image tower, and teacher.of is {list(stage.teacher.of)}; take images out, or "
            "name a model that has one as teacher.model"
        )

    def of_texts(parts: Iterator[Sequence[Any]]) -> np.ndarray:
        return np.concatenate([model.embed_texts(part) for part in parts])

    answers = {"texts": of_texts, "captions": of_texts, "images": model.embed_image_batches}
    return Teacher(name, model.fingerprint, answers)


def _answers(teacher: Teacher, store: StoredVectors, shard: int, said: Said) -> tuple[np.ndarray, dict[int, str]]:
    """The vectors `[n, V, T]` of a shard's samples, V of the one with most questions, and why some have none."""
    import numpy as np

    rows: list[tuple[int, int]] = []
    unusable: dict[int, str] = {}
    questions = _questions(store, shard, said, rows, unusable)
    if (first := next(questions, None)) is None:
        raise UserError(
            f"no sample of shard {shard} of {store.data.directory} can be read by the teacher, the last one because: "
            f"{unusable[len(store.data.samples_of(shard)) - 1]}"
        )
    found = teacher.answers[said.of](chain([first], questions))
    places, views = np.array(rows).T
    vectors = np.zeros((store.data.shard_sizes[shard], views.max() + 1, found.shape[1]), np.float32)
    vectors[places, views] = found
    return vectors, unusable


def _questions(
    store: StoredVectors, shard: int, said: Said, rows: list[tuple[int, int]], unusable: dict[int, str]
) -> Iterator[list[Any]]:
    """The questions about a shard's samples, `CHUNK` at once; adds the place and number of each to `rows`, and to
    `unusable` why there are none of a sample."""
    from data_prep.shards import ShardError, ShardUnavailable, Unusable
    from vision_tower import ImageError

    waiting: list[Any] = []
    for place, index in enumerate(store.data.samples_of(shard)):
        try:
            found = said.questions(store.data, index)
        except ShardUnavailable as error:  # it may be there tomorrow: nothing is written that says otherwise
            raise UserError(str(error)) from error
        except Unusable as error:
            unusable[place] = f"{store.data.directory}: sample {store.data.row(index).key} has {error}"
        except (ShardError, ImageError) as error:
            unusable[place] = str(error)
        else:
            rows += [(place, number) for number in range(len(found))]
            waiting += found
        while len(waiting) >= CHUNK:
            yield waiting[:CHUNK]
            del waiting[:CHUNK]
    if waiting:
        yield waiting
