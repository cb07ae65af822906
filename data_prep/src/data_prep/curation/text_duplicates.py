"""Text pairs and triplets that are the same, or nearly, and texts that an evaluation set holds: by MinHash."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.curation import passes
from data_prep.curation.minhash import Signatures, match, near_duplicates, signatures
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.curation.verdicts import KEPT, NEAR, Verdicts
from data_prep.execute import Output
from data_prep.shards.format import JsonObject

# A text that says less ("a cat") is in an evaluation set by chance. In letters of an alphabet: parallel texts have a
# third as many characters in Chinese, half as many in Korean.
TELLING = 25
_WEIGHTS = {"CJK": 3.0, "HANGUL": 2.0, "HIRAGANA": 1.5, "KATAKANA": 1.5}
_AT_A_TIME = 2000


def information(text: str) -> float:
    """How much a text says, in letters of an alphabet; a Chinese character counts as three, a Korean one as two."""
    if text.isascii():
        return len(text)
    return sum(_WEIGHTS.get(unicodedata.name(character, "").partition(" ")[0], 1.0) for character in text)


def sign(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: a key and a signature of each sample, and with `sides` one of each text that says enough."""
    exact: list[bytes] = []
    owners: list[int] = []
    whole: list[Signatures] = []
    single: list[Signatures] = []
    joined: list[str] = []
    telling: list[str] = []
    for number, sample in enumerate(passes.samples_of(piece)):
        output.came_in()
        joined.append(_whole(sample))
        exact.append(hashlib.sha256(joined[-1].encode("utf-8", "replace")).digest()[:16])
        if options["sides"]:
            own = _telling(sample)
            if not own:
                output.note("samples whose texts are too short to be looked for in an evaluation set")
            telling += own
            owners += [number] * len(own)
        if len(joined) == _AT_A_TIME:
            whole.append(signatures(joined))
            single.append(signatures(telling))
            joined, telling = [], []
    all_, one = Signatures.join([*whole, signatures(joined)]), Signatures.join([*single, signatures(telling)])
    passes.save(
        Path(piece["survey"]),
        exact=np.frombuffer(b"".join(exact), np.uint64).reshape(-1, 2),
        side_bands=one.bands,
        side_low=one.low,
        owners=np.array(owners, np.int64),
        **arrays_of("whole", all_),
    )


def decide(
    files: Sequence[Path], tests: int, similarity: float, near: bool, samples: passes.Numbered
) -> tuple[Verdicts, list[int]]:
    """The verdicts by the survey's files, of which the first `tests` are those of evaluation sets; sizes of the others.

    Args:
        near: False: equal texts only. samples: of all the files.
    """
    sizes = [len(passes.load(file, "exact")["exact"]) for file in files]
    begin = sum(sizes[:tests])
    verdicts = Verdicts(sum(sizes), begin)
    verdicts.equals(np.concatenate([passes.load(file, "exact")["exact"] for file in files[tests:]]))
    if tests:
        starts = (np.cumsum(sizes) - sizes).tolist()
        known = _Sides(files[:tests], starts[:tests], samples)
        for file, start in zip(files[tests:], starts[tests:], strict=True):
            own = _Sides([file], [start], samples)
            found = match(
                own.signed,
                known.signed,
                similarity=similarity if near else 1.0,
                text_of=own.text,
                known_text_of=known.text,
            )
            places = np.flatnonzero(found >= 0)
            verdicts.fall(own.owners[places], known.owners[found[places]], NEAR)
    if near:
        with SignatureStore(files[tests:], "whole") as stored:
            first = near_duplicates(
                stored,
                similarity=similarity,
                among=verdicts.what[begin:] == KEPT,
                text_of=lambda number: _whole(samples.sample(number + begin)),
            )
        later = np.flatnonzero(first != np.arange(len(first)))
        verdicts.fall(later + begin, first[later] + begin, NEAR)
    verdicts.settle()
    return verdicts, sizes[tests:]


class _Sides:
    """The single texts of the samples of some files: their signatures, and the number of each one's sample. `starts`
    are the numbers of the files' first samples."""

    def __init__(self, files: Sequence[Path], starts: Sequence[int], samples: passes.Numbered) -> None:
        parts = [passes.load(file, "side_bands", "side_low", "owners") for file in files]
        self.signed = Signatures.join([Signatures(part["side_bands"], part["side_low"]) for part in parts])
        self.owners = np.concatenate([part["owners"] + start for part, start in zip(parts, starts, strict=True)])
        self._samples = samples

    def text(self, number: int) -> str:
        owner = int(self.owners[number])
        return _telling(self._samples.sample(owner))[number - int(np.searchsorted(self.owners, owner))]


def _texts(sample: passes.Sample) -> list[str]:
    return [" ".join(text["text"].split()) for side in sample.texts[:2] for text in side]


def _whole(sample: passes.Sample) -> str:
    return "\n".join(_texts(sample))


def _telling(sample: passes.Sample) -> list[str]:
    return [text for text in dict.fromkeys(_texts(sample)) if information(text) >= TELLING]
