"""Which data sets a path means for evaluation: those of a corpus, those of a folder, or the path itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import MANIFEST, Dataset, ShardError

from stage_trainer.errors import UserError
from stage_trainer.evaluation.measures import name_beside
from stage_trainer.evaluation.sets import SPLITS
from stage_trainer.recipe.address import is_remote

_ORDER = ("image-short", "image-long", "image-triplets", "text-pairs", "text-triplets")


@dataclass(frozen=True)
class HeldOut:
    """A held-out data set: its folder, its kind, and a name that is unique among those found with it."""

    directory: Path
    kind: str
    name: str

    @property
    def images(self) -> bool:
        return self.kind.startswith("image-")


@dataclass(frozen=True)
class Found:
    """What a path means; `where` describes it in messages: "the test split of runs/corpus"."""

    where: str
    sets: tuple[HeldOut, ...]


def find(data: str | Path) -> Found:
    """The data sets of a corpus (its test split, or its validation split), or of a folder such as `data/validation`, or
    `data` itself.

    Raises:
        UserError: there are none, or one of them is damaged.
    """
    if is_remote(str(data)):
        raise UserError(f"{data} is an address; evaluation reads folders: copy the held-out data sets to this machine")
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"there is no folder {data}; give a corpus, a folder of data sets, or one data set")
    if (data / MANIFEST).exists():
        return Found(str(data), _open([data]))
    for split in SPLITS:
        if folders := _below(data / split):
            return Found(f"the {split} split of {data}", _open(folders))
    if folders := _below(data):
        return Found(str(data), _open(folders))
    train = "; the train split that it has is what models learn from" if _below(data / "train") else ""
    raise UserError(
        f"{data} holds no held-out data sets{train}. Expected SPLIT/KIND/NAME/{MANIFEST} below a corpus, SPLIT being "
        f"{' or '.join(SPLITS)}, or KIND/NAME or NAME below a folder, as `data-prep import images PHOTOS --table T.csv "
        "--name NAME --out data/validation` writes them"
    )


def _below(folder: Path) -> list[Path]:
    return sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{MANIFEST}")})


def _open(folders: Iterable[Path]) -> tuple[HeldOut, ...]:
    try:
        opened = [(folder, Dataset.open(folder)) for folder in folders]
    except (ShardError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    opened.sort(key=lambda entry: (_ORDER.index(entry[1].kind), entry[1].source))
    sets: dict[str, HeldOut] = {}
    for folder, data in opened:
        name = name_beside(sets, data.source, data.kind, str(folder))
        sets[name] = HeldOut(folder, data.kind, name)
    return tuple(sets.values())
