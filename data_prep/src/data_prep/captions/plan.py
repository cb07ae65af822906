"""Planning: which images get captions, in which languages, by which model and prompt."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.captions.images import image_of
from data_prep.captions.ledger import RequestLedger, request_id
from data_prep.captions.texts import PROMPTS, Prompt, read_prompt
from data_prep.errors import UserError
from data_prep.shards import Dataset
from data_prep.shards.format import JsonObject


@dataclass(frozen=True)
class Plan:
    """What to plan.

    model: its name at the service. languages: ISO 639-1 codes. prompt_version: a folder of prompts.
    max_tokens: of an answer. detail: of the image: "low", "high", "auto" or None (not sent).
    body: further fields of the request ("temperature", "seed", …), part of the request's identity.
    images: how many to draw, by hash with `seed`; None: all.
    """

    model: str
    languages: tuple[str, ...]
    prompt_version: str = "v1"
    max_tokens: int = 1024
    detail: str | None = None
    body: JsonObject = field(default_factory=dict)
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        reserved = sorted({"model", "messages", "stream", "n", "max_tokens", "max_completion_tokens"} & set(self.body))
        if reserved:
            raise UserError(f"the request's field {reserved[0]!r} is ours to set; leave it out of --body")
        try:
            json.dumps([self.model, self.body], allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:  # a request could not hold it
            raise UserError(
                f"--model and --body cannot be sent as JSON ({error}); give text and finite numbers"
            ) from error
        if not self.model.strip():
            raise UserError(f"--model {self.model!r}: expected the name of a model")
        if self.max_tokens < 1 or (self.images is not None and self.images < 1):
            raise UserError(f"max_tokens {self.max_tokens} and images {self.images}: expected at least 1")

    @property
    def options(self) -> JsonObject:
        """The part of a request's identity beside image, language, prompt and model."""
        return {"max_tokens": self.max_tokens, "detail": self.detail, "body": self.body}


@dataclass(frozen=True)
class Planned:
    """images: distinct ones; twice: repeated ones; new: requests added; known: requests that were there before."""

    images: int
    twice: int
    new: int
    known: int


def plan(
    ledger: RequestLedger,
    datasets: Sequence[str | Path],
    wanted: Plan,
    *,
    prompts: Path = PROMPTS,
    tick: Callable[[], None] = lambda: None,
) -> Planned:
    """Add the requests for every image of `datasets` to the ledger; known ones stay as they are.

    An image that occurs several times (the same bytes) is asked about once. Images that the ledger knows are read from
    where this plan found them from now on. `tick` is called once an image.

    Raises:
        UserError: a data set without images, no such prompt, or a prompt whose text changed under its version.
        ShardError: a data set cannot be read.
    """
    texts = [read_prompt(wanted.prompt_version, language, prompts) for language in wanted.languages]
    opened = [Dataset.open(directory) for directory in datasets]
    for dataset in opened:
        if not dataset.kind.startswith("image"):
            raise UserError(f"{dataset.directory} holds {dataset.kind}; captions are made for data sets of images")
    found, twice = _find(opened, tick)
    chosen = _draw(list(found), wanted)
    with ledger.exclusive(), ledger.transaction() as db:
        for prompt in texts:
            _note_prompt(ledger, prompt)
        options = json.dumps(wanted.options, sort_keys=True, ensure_ascii=False)
        recipe = (wanted.model, wanted.prompt_version, options)
        db.execute("INSERT OR IGNORE INTO recipe (model, prompt_version, options) VALUES (?, ?, ?)", recipe)
        (number,) = db.execute(
            "SELECT id FROM recipe WHERE (model, prompt_version, options) = (?, ?, ?)", recipe
        ).fetchone()
        before = db.execute("SELECT count(*) FROM request").fetchone()[0]
        db.executemany(
            "UPDATE image SET dataset = ?, number = ? WHERE sha256 = ?",
            ((*place, image) for image, place in found.items()),
        )
        db.executemany("INSERT OR IGNORE INTO image VALUES (?, ?, ?)", ((image, *found[image]) for image in chosen))
        db.executemany(
            "INSERT OR IGNORE INTO request (id, image, language, recipe, state) VALUES (?, ?, ?, ?, 'planned')",
            (
                (
                    request_id(image, language, wanted.prompt_version, wanted.model, wanted.options),
                    image,
                    language,
                    number,
                )
                for image in chosen
                for language in wanted.languages
            ),
        )
        new = db.execute("SELECT count(*) FROM request").fetchone()[0] - before
    return Planned(images=len(found), twice=twice, new=new, known=len(chosen) * len(wanted.languages) - new)


def _find(datasets: Sequence[Dataset], tick: Callable[[], None]) -> tuple[dict[str, tuple[str, int]], int]:
    """Where each image is first found, sha256 → (data set, number) in their order, and how many came twice."""
    found: dict[str, tuple[str, int]] = {}
    twice = 0
    for dataset in datasets:
        directory = str(dataset.directory.resolve())
        for number in range(len(dataset)):
            tick()
            digest = hashlib.sha256(image_of(dataset.read(number))[1]).hexdigest()
            twice += digest in found
            found.setdefault(digest, (directory, number))
    return found, twice


def _draw(images: list[str], wanted: Plan) -> list[str]:
    """The images to describe, in their order."""
    if wanted.images is None:
        return images

    def lot(digest: str) -> str:
        return hashlib.sha256(f"{wanted.seed}:{digest}".encode()).hexdigest()

    drawn = set(heapq.nsmallest(wanted.images, images, key=lot))
    return [digest for digest in images if digest in drawn]


def _note_prompt(ledger: RequestLedger, prompt: Prompt) -> None:
    key = (prompt.version, prompt.language)
    ledger.db.execute("INSERT OR IGNORE INTO prompt VALUES (?, ?, ?, ?)", (*key, prompt.sha256, prompt.text))
    (known,) = ledger.db.execute("SELECT sha256 FROM prompt WHERE (version, language) = (?, ?)", key).fetchone()
    if known != prompt.sha256:
        raise UserError(
            f"prompt {prompt.version}/{prompt.language} is not the text that {ledger.path} was planned with; captions "
            "of two prompts must not share a version: give the new text a new version"
        )
