"""Removes exact duplicates, near-duplicates, and whatever an evaluation set holds."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.curation import passes
from data_prep.curation.minhash import Signatures, matches, near_duplicates, signatures
from data_prep.curation.phash import UNREADABLE, pairs_within, perceptual_hash
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.errors import UserError
from data_prep.execute import Execution, Output, Target
from data_prep.groups import join, pairs_of_equals
from data_prep.images import STORED
from data_prep.shards.format import JsonObject

KEPT, EXACT, NEAR, TEST, BROKEN = range(5)
REASONS = {
    EXACT: "the same as an earlier one",
    NEAR: "nearly the same as an earlier one",
    TEST: "in an evaluation set",
    BROKEN: "an image that cannot be decoded",
}
# Characters; a shorter text ("a cat") is in an evaluation set by chance.
TELLING = 25
_AT_A_TIME = 2000


def deduplicate(
    directories: Sequence[str],
    target: Target,
    *,
    against: Sequence[str] = (),
    similarity: float = 0.8,
    distance: int = 4,
    near: bool = True,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Write the data sets to `target` without duplicates, of which the first stays.

    Samples with images are compared by image; text pairs and triplets by all their queries and targets. A sample is
    also removed if its image, or a text of `TELLING` or more characters, is nearly one of `against`.

    Args:
        similarity: texts with this estimated Jaccard similarity or more are near-duplicates.
        distance: images whose perceptual hashes differ in at most so many bits are near-duplicates.
        near: False: remove exact duplicates only.
    """
    if not 0 <= distance <= 15 or not 0 < similarity <= 1:
        raise UserError("--distance is from 0 to 15 bits and --similarity above 0 and up to 1")
    datasets = passes.open_alike(directories)
    tests = passes.open_alike(against) if against else []
    images = datasets[0].kind.startswith("image")
    if tests and tests[0].kind.startswith("image") != images:
        raise UserError(
            f"{tests[0].directory} holds {tests[0].kind}; {datasets[0].kind} can only be compared with its kind"
        )
    before = passes.pieces_of(tests)
    pieces = [*before, *passes.pieces_of(datasets)]
    survey = passes.Survey(target, f"{__name__}:sign", pieces, {"images": images, "sides": bool(tests)})
    fingerprints = [test.fingerprint for test in tests]
    rules = {"similarity": similarity, "distance": distance, "near": near, "against": fingerprints}
    job = passes.job_on(datasets, target, "dedup", f"{__name__}:drop", rules, survey)

    def decide(survey: passes.Survey) -> list[np.ndarray]:
        files = survey.files()
        if images:
            return _decide_images(files, len(before), distance if near else -1)
        return _decide_texts(files, len(before), similarity if near else 2.0)

    return passes.two_passes(survey, job, decide, execution)


def sign(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: an exact key of each sample, and its perceptual hash or MinHash signature."""
    if options["images"]:
        _sign_images(piece, output)
    else:
        _sign_texts(piece, options["sides"], output)


def drop(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The rewriting pass."""
    for sample, verdict in zip(passes.samples_of(piece), passes.decision(piece).tolist(), strict=True):
        output.came_in()
        if verdict == KEPT:
            passes.copy(output, piece, sample)
        else:
            output.drop(REASONS[verdict], f"{piece['dataset']}: {sample.row.key}")


def _sign_images(piece: JsonObject, output: Output) -> None:
    exact, hashes, hashed, broken = [], [], [], []
    for sample in passes.samples_of(piece):
        output.came_in()
        exact.append(_key(sample.image))
        found = None
        try:
            with Image.open(io.BytesIO(sample.image), formats=STORED) as image:
                found = perceptual_hash(image)
            broken.append(False)
        except UNREADABLE:
            broken.append(True)
        hashes.append(found or 0)
        hashed.append(found is not None)
    passes.save(
        Path(piece["survey"]),
        exact=_array(exact),
        hashes=np.array(hashes, np.uint64),
        hashed=np.array(hashed, bool),
        broken=np.array(broken, bool),
    )


def _sign_texts(piece: JsonObject, sides: bool, output: Output) -> None:
    exact: list[int] = []
    owners: list[int] = []
    whole: list[Signatures] = []
    single: list[Signatures] = []
    joined: list[str] = []
    telling: list[str] = []
    for number, sample in enumerate(passes.samples_of(piece)):
        output.came_in()
        texts = [" ".join(text["text"].split()) for side in sample.texts[:2] for text in side]
        joined.append("\n".join(texts))
        exact.append(_key(joined[-1].encode("utf-8", "replace")))
        if sides:
            own = [text for text in dict.fromkeys(texts) if len(text) >= TELLING]
            telling += own
            owners += [number] * len(own)
        if len(joined) == _AT_A_TIME:
            whole.append(signatures(joined))
            single.append(signatures(telling))
            joined, telling = [], []
    all_, one = Signatures.join([*whole, signatures(joined)]), Signatures.join([*single, signatures(telling)])
    passes.save(
        Path(piece["survey"]),
        exact=_array(exact),
        side_bands=one.bands,
        side_low=one.low,
        owners=np.array(owners, np.int64),
        **arrays_of("whole", all_),
    )


def _decide_images(files: Sequence[Path], tests: int, distance: int) -> list[np.ndarray]:
    found = [passes.load(file) for file in files]
    sizes = [len(part["hashes"]) for part in found]
    exact = np.concatenate([part["exact"] for part in found])
    hashes, hashed = (np.concatenate([part[name] for part in found]) for name in ("hashes", "hashed"))
    begin = sum(sizes[:tests])
    verdicts = _exact_verdicts(exact, begin)
    if distance >= 0:
        places = np.flatnonzero(hashed)
        pairs = places[pairs_within(hashes[places], distance)]
        in_test = pairs[:, 0] < begin
        group = np.arange(len(hashes))
        join(group, pairs[~in_test])
        later = group != np.arange(len(group))
        verdicts[later & (verdicts == KEPT)] = NEAR
        verdicts[pairs[in_test][:, 1]] = TEST
    verdicts[np.concatenate([part["broken"] for part in found])] = BROKEN
    return np.split(verdicts[begin:], np.cumsum(sizes[tests:])[:-1])


def _decide_texts(files: Sequence[Path], tests: int, similarity: float) -> list[np.ndarray]:
    exact, in_test = [], []
    sides = [passes.load(file, "side_bands", "side_low") for file in files[:tests]]
    known = Signatures.join([Signatures(part["side_bands"], part["side_low"]) for part in sides]) if sides else None
    for file in files[tests:]:  # one at a time: all signatures do not fit into memory
        exact.append(passes.load(file, "exact")["exact"])
        flags = np.zeros(len(exact[-1]), bool)
        if known is not None:
            part = passes.load(file, "side_bands", "side_low", "owners")
            own = Signatures(part["side_bands"], part["side_low"])
            flags[part["owners"][matches(own, known, similarity=min(similarity, 1.0))]] = True
        in_test.append(flags)
    sizes = [len(part) for part in exact]
    keys = np.concatenate(exact)
    del exact
    verdicts = _exact_verdicts(keys, 0)
    del keys
    if similarity <= 1:
        with SignatureStore(files[tests:], "whole") as stored:
            group = near_duplicates(stored, similarity=similarity)
        verdicts[(group != np.arange(len(group))) & (verdicts == KEPT)] = NEAR
    verdicts[np.concatenate(in_test)] = TEST
    return np.split(verdicts, np.cumsum(sizes)[:-1])


def _exact_verdicts(keys: np.ndarray, begin: int) -> np.ndarray:
    """KEPT, EXACT or TEST for each `[N, 2]` key; the first `begin` are those of evaluation sets."""
    earliest = np.arange(len(keys))
    for pairs in pairs_of_equals(keys[:, 0]):
        join(earliest, pairs[keys[pairs[:, 0], 1] == keys[pairs[:, 1], 1]])
    verdicts = np.where(earliest == np.arange(len(keys)), KEPT, EXACT).astype(np.uint8)
    verdicts[(earliest < begin) & (np.arange(len(keys)) >= begin)] = TEST
    return verdicts


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:16], "big")


def _array(keys: Sequence[int]) -> np.ndarray:
    """128-bit keys as `[N, 2]` uint64."""
    return np.array([divmod(key, 1 << 64) for key in keys], np.uint64).reshape(-1, 2)
