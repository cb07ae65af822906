"""The images of a ledger, read from their data sets and checked against the hash that was planned."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from data_prep.captions.request import Request
from data_prep.errors import UserError
from data_prep.execute.dropped import DroppedList
from data_prep.shards import Dataset
from data_prep.shards.format import IMAGE_TYPES


def image_of(members: dict[str, bytes]) -> tuple[str, bytes]:
    """(media type, bytes) of the image of a sample as `Dataset.read` gives it. UserError if it has none."""
    extension = next((extension for extension in IMAGE_TYPES if extension in members), None)
    if extension is None:
        raise UserError(f"a sample of {', '.join(members)} has no image; `data-prep validate` finds all such samples")
    return IMAGE_TYPES[extension], members[extension]


def place_of(dataset: str | Path, number: int) -> str:
    """How lists and messages call an image of a data set."""
    return f"image {number} of {dataset}"


def list_unusable(ledger: Path, command: str, images: Mapping[str, str]) -> Path | None:
    """Write the images that a command could not use, place → why, to LEDGER.COMMAND-dropped.jsonl, and return its path.

    Without any, the list of the last such command is removed. ShardError if the disk refuses.
    """
    path = ledger.with_name(f"{ledger.name}.{command}-dropped.jsonl")
    if not images:
        path.unlink(missing_ok=True)
        return None
    dropped = DroppedList(path, str(ledger))
    for place, why in images.items():
        dropped.add(why, place)
    dropped.finish()
    return path


class ImageReader:
    """Reads images by data set and number; a data set is opened once.

    A ledger knows an image by the hash of its bytes. A data set that was built again may hold another image at the same
    place, whose caption would be paid for and stored with the wrong image.
    """

    def __init__(self) -> None:
        self.dataset: Callable[[str], Dataset] = functools.cache(Dataset.open)

    def of(self, request: Request) -> tuple[str, bytes]:
        """(media type, bytes) of the image that a request is about; raises as `members` does."""
        return image_of(self.members(request.dataset, request.number, request.image))

    def members(self, directory: str, number: int, sha256: str) -> dict[str, bytes]:
        """The members of sample `number`, whose image has this hash.

        Raises:
            UserError: the image there is another one, or there is none.
            ShardError: the data set cannot be read.
        """
        dataset = self.dataset(directory)
        if dataset.kind.startswith("image") and number < len(dataset):
            members = dataset.read(number)
            if hashlib.sha256(image_of(members)[1]).hexdigest() == sha256:
                return members
        raise UserError(
            f"{directory}: image {number} is not the one that was planned, so it is not used and not sent: the data "
            "set was built again since. Run `data-prep captions plan` on it as before, which notes where each image "
            "is now, or put the old data set back"
        )
