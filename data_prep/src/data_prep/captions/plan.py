"""Planning: which images get captions, in which languages, by which model and prompt."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.captions.images import image_of, place_of
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.request import request_id
from data_prep.captions.texts import PROMPTS, Prompt, read_prompt
from data_prep.errors import UserError
from data_prep.shards import Dataset, ShardError, ShardUnavailable
from data_prep.shards.format import JsonObject

_NONE = bytes(32)  # in the place of the hash of an image that cannot be read
_SECRET = re.compile(r"(x-)?api[-_]?key|authorization|passw(or)?d|(client[-_])?secret|((access|auth)[-_])?token", re.I)
_AT_A_TIME = 500  # images: what a plan that is killed loses at most


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
        if secret := next((name for name in _names(self.body) if _SECRET.fullmatch(name)), None):
            raise UserError(
                f"--body's field {secret!r}: the ledger would keep that secret; set it in the environment variable of "
                "--key-env, or in the URL"
            )
        if not self.model.strip():
            raise UserError(f"--model {self.model!r}: expected the name of a model")
        if self.max_tokens < 1 or (self.images is not None and self.images < 1):
            raise UserError(f"max_tokens {self.max_tokens} and images {self.images}: expected at least 1")

    @property
    def options(self) -> JsonObject:
        """The part of a request's identity beside image, language, prompt and model."""
        return {"max_tokens": self.max_tokens, "detail": self.detail, "body": self.body}


def _names(body: object) -> Iterator[str]:
    """The names of all fields of a JSON value."""
    if isinstance(body, dict):
        yield from body
    for inner in body.values() if isinstance(body, dict) else body if isinstance(body, list) else ():
        yield from _names(inner)


@dataclass(frozen=True)
class Planned:
    """images: distinct ones; twice: repeated ones; new: requests added; known: requests that were there before;
    unreadable: the place of each image that cannot be read → why.
    """

    images: int
    twice: int
    new: int
    known: int
    unreadable: Mapping[str, str] = field(default_factory=dict)


def plan(
    ledger: RequestLedger,
    datasets: Sequence[str | Path],
    wanted: Plan,
    *,
    prompts: Path = PROMPTS,
    tick: Callable[[bool], None] = lambda new: None,
) -> Planned:
    """Add the requests for every image of `datasets` to the ledger; known ones stay as they are.

    An image that occurs several times (the same bytes) is asked about once. Images that the ledger knows are read from
    where this plan found them from now on. What is done is committed every `_AT_A_TIME` images, so that a plan that is
    killed goes on where it was; memory grows by some 100 bytes an image. `tick` is called once an image in each of
    `passes`, with whether it was hashed only now.

    Raises:
        UserError: a data set without images, no such prompt, or a prompt whose text changed under its version.
        ShardError: a data set or one of its shards cannot be read.
    """
    texts = [read_prompt(wanted.prompt_version, language, prompts) for language in wanted.languages]
    opened = [Dataset.open(directory) for directory in datasets]
    for dataset in opened:
        if not dataset.kind.startswith("image"):
            raise UserError(f"{dataset.directory} holds {dataset.kind}; captions are made for data sets of images")
    with ledger.exclusive():
        with ledger.transaction():
            for prompt in texts:
                _note_prompt(ledger, prompt)
            recipe = _note_recipe(ledger, wanted)
        chosen = None if wanted.images is None else _draw(ledger, opened, wanted, tick)
        return _Planning(ledger, wanted, recipe, chosen).drive(opened, tick)


def passes(wanted: Plan) -> int:
    """How often `plan` goes through all images: what is drawn is known once all are hashed."""
    return 1 if wanted.images is None else 2


@dataclass
class _Planning:
    """Writes requests, `_AT_A_TIME` images in a transaction. chosen: hashes of the images to describe; None: all."""

    ledger: RequestLedger
    wanted: Plan
    recipe: int
    chosen: set[bytes] | None

    def __post_init__(self) -> None:
        self.seen: set[bytes] = set()
        self.unreadable: dict[str, str] = {}
        self.twice = self.described = self.new = 0

    def drive(self, datasets: Sequence[Dataset], tick: Callable[[bool], None]) -> Planned:
        for dataset in datasets:
            directory = str(dataset.directory.resolve())
            for start, digests in _hashes(self.ledger, dataset, tick, self.unreadable):
                with self.ledger.transaction():
                    for number, digest in enumerate(digests, start):
                        if digest != _NONE:
                            self._image(digest, directory, number)
        known = self.described * len(self.wanted.languages) - self.new
        return Planned(len(self.seen), self.twice, self.new, known, self.unreadable)

    def _image(self, digest: bytes, directory: str, number: int) -> None:
        """Note where an image is, and add the requests about it that are not there yet."""
        if digest in self.seen:
            self.twice += 1
            return
        self.seen.add(digest)
        db, sha256 = self.ledger.db, digest.hex()
        row = db.execute("SELECT id, dataset, number FROM image WHERE sha256 = ?", (sha256,)).fetchone()
        if row is not None and (row["dataset"], row["number"]) != (directory, number):
            db.execute("UPDATE image SET dataset = ?, number = ? WHERE id = ?", (directory, number, row["id"]))
        if self.chosen is not None and digest not in self.chosen:
            return
        self.described += 1
        place = (sha256, directory, number)
        image = row["id"] if row is not None else None
        if image is None:
            image = db.execute("INSERT INTO image (sha256, dataset, number) VALUES (?, ?, ?)", place).lastrowid
        asked = db.execute("SELECT language FROM request WHERE image = ? AND recipe = ?", (image, self.recipe))
        known = {language for (language,) in asked}
        missing = [language for language in self.wanted.languages if language not in known]
        own = (self.wanted.prompt_version, self.wanted.model, self.wanted.options)
        db.executemany(
            "INSERT INTO request (id, image, language, recipe, state) VALUES (?, ?, ?, ?, 'planned')",
            [(request_id(sha256, language, *own), image, language, self.recipe) for language in missing],
        )
        self.new += len(missing)


def _hashes(
    ledger: RequestLedger, dataset: Dataset, tick: Callable[[bool], None], unreadable: dict[str, str]
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(number of the first image, sha256 of each from there on), `_AT_A_TIME` images at a time.

    What an earlier plan hashed is in the ledger: under the manifest's hash, so wherever the data set is by now.
    """
    db = ledger.db
    for start in range(0, len(dataset), _AT_A_TIME):
        place = (dataset.fingerprint, start)
        numbers = range(start, min(start + _AT_A_TIME, len(dataset)))
        row = db.execute("SELECT digests FROM hashed WHERE (fingerprint, start) = (?, ?)", place).fetchone()
        if row is None:
            digests = []
            for number in numbers:
                digests.append(_hash(dataset, number, unreadable))
                tick(True)
            joined = b"".join(digests)
            if _NONE not in digests:  # or it would be missing for ever, though the data set is repaired
                db.execute("INSERT INTO hashed VALUES (?, ?, ?)", (*place, joined))
        else:
            joined = row["digests"]
            for _ in numbers:
                tick(False)
        yield start, (joined[at : at + 32] for at in range(0, len(joined), 32))


def _hash(dataset: Dataset, number: int, unreadable: dict[str, str]) -> bytes:
    """The sha256 of an image's bytes, which are not decoded; `_NONE` if it cannot be read: `unreadable` gets why."""
    try:
        return hashlib.sha256(image_of(dataset.read(number))[1]).digest()
    except ShardUnavailable:
        raise
    except (ShardError, UserError) as error:
        unreadable[place_of(dataset.directory, number)] = str(error)
        return _NONE


def _draw(ledger: RequestLedger, datasets: Sequence[Dataset], wanted: Plan, tick: Callable[[bool], None]) -> set[bytes]:
    """The hashes of the images to describe."""
    found = (_hashes(ledger, dataset, tick, {}) for dataset in datasets)
    every = {digest for chunks in found for _, digests in chunks for digest in digests} - {_NONE}

    def lot(digest: bytes) -> str:
        return hashlib.sha256(f"{wanted.seed}:{digest.hex()}".encode()).hexdigest()

    return set(heapq.nsmallest(wanted.images or 0, every, key=lot))


def _note_recipe(ledger: RequestLedger, wanted: Plan) -> int:
    options = json.dumps(wanted.options, sort_keys=True, ensure_ascii=False)
    recipe = (wanted.model, wanted.prompt_version, options)
    ledger.db.execute("INSERT OR IGNORE INTO recipe (model, prompt_version, options) VALUES (?, ?, ?)", recipe)
    where = "SELECT id FROM recipe WHERE (model, prompt_version, options) = (?, ?, ?)"
    number: int = ledger.db.execute(where, recipe).fetchone()[0]
    return number


def _note_prompt(ledger: RequestLedger, prompt: Prompt) -> None:
    key = (prompt.version, prompt.language)
    ledger.db.execute("INSERT OR IGNORE INTO prompt VALUES (?, ?, ?, ?)", (*key, prompt.sha256, prompt.text))
    (known,) = ledger.db.execute("SELECT sha256 FROM prompt WHERE (version, language) = (?, ?)", key).fetchone()
    if known != prompt.sha256:
        raise UserError(
            f"prompt {prompt.version}/{prompt.language} is not the text that {ledger.path} was planned with; captions "
            "of two prompts must not share a version: give the new text a new version"
        )
