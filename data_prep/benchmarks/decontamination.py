"""What `dedup --against` finds of texts of an evaluation set, in each language, beside brute force.

    python data_prep/benchmarks/decontamination.py --declaration package/declaration --messages python

In each language up to 100 texts of `translations.py` are the evaluation set. The training set holds each of them as it
is, in capitals without punctuation, with a word more, with one to three words replaced, and with a word left out (where
there are no spaces a word is three characters), and up to 200 other texts. Brute force compares every pair by the exact
Jaccard similarity of runs of five characters; what it calls alike to 0.8 has to go, and nothing else. Texts that say
too little to be compared are counted apart. Writes `results/decontamination.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from common import machine, write
from data_prep.curation import passes, text_duplicates
from data_prep.curation.minhash import normalize_text
from data_prep.curation.text_duplicates import TELLING, information
from data_prep.curation.verdicts import TEST
from data_prep.execute import Execution, Target
from data_prep.samples import Text, texts_json
from data_prep.shards import Dataset, DatasetWriter
from translations import add_arguments, translations

_TESTS, _OTHERS = 100, 200
_SIMILARITY = 0.8


def runs(text: str) -> set[str]:
    line = normalize_text(text).ljust(5)
    return {line[place : place + 5] for place in range(len(line) - 4)}


def changed(text: str, words: list[str], draw: random.Random) -> list[str]:
    """A text as it is, and what people and programs make of it."""
    gap = " " if text.count(" ") * 12 >= len(text) else ""
    parts = text.split() if gap else [text[place : place + 3] for place in range(0, len(text), 3)]
    found = [text, "".join(one for one in text.upper() if one.isalnum() or one.isspace() or ord(one) > 127)]
    found.append(gap.join([*parts, draw.choice(words)]))
    for count in (1, 2, 3):
        replaced = parts.copy()
        for _ in range(count):
            replaced[draw.randrange(len(parts))] = draw.choice(words)
        found.append(gap.join(replaced))
    left = draw.randrange(len(parts))
    return [*found, gap.join(parts[:left] + parts[left + 1 :])]


def alike(training: list[str], tests: list[str]) -> np.ndarray:
    """The similarity of each training text to the test text that is most like it, `[N]`, by comparing all pairs."""
    known = [runs(text) for text in tests]
    found = []
    for text in training:
        own = runs(text)
        found.append(max(len(own & one) / len(own | one) for one in known))
    return np.array(found)


def save(folder: Path, texts: list[str], language: str) -> Dataset:
    with DatasetWriter(folder, kind="text-pairs", source=folder.name) as writer:
        for number, text in enumerate(texts):
            query, target = ([Text(one, language, "body")] for one in (str(number), text))
            content = texts_json(query, target, source=folder.name, item=str(number))
            writer.write(f"{number:05d}", {"json": content}, languages=[language], tokens=None)
    return Dataset.open(folder)


def found(folder: Path, training: list[str], tests: list[str], language: str) -> np.ndarray:
    """Which of the training texts `dedup --against` drops as those of the evaluation set, `[N]` bool."""
    both = [save(folder / "tests", tests, language), save(folder / "training", training, language)]
    before = len(passes.pieces_of(both[:1]))
    survey = passes.Survey(
        Target(str(folder), "x"), "data_prep.curation.text_duplicates:sign", passes.pieces_of(both), {"sides": True}
    )
    with redirect_stdout(StringIO()):
        survey.run(Execution(workers=1))
    samples = passes.Numbered([str(dataset.directory) for dataset in both])
    verdicts, _ = text_duplicates.decide(survey.files(), before, _SIMILARITY, True, samples)
    dropped: np.ndarray = verdicts.what[verdicts.begin :] == TEST
    return dropped


def measure(language: str, texts: list[str]) -> dict[str, float]:
    draw = random.Random(0)
    drawn = draw.sample(texts, min(_TESTS + _OTHERS, len(texts) - len(texts) // 3))
    tests, others = drawn[:_TESTS], drawn[_TESTS:]
    words = [word for text in texts for word in text.split()]
    training = [*others, *(one for text in tests for one in changed(text, words, draw))]
    telling = np.array([information(text) >= TELLING for text in training])
    similar = alike(training, [text for text in tests if information(text) >= TELLING])
    short = ~telling & (alike(training, tests) >= _SIMILARITY)
    with tempfile.TemporaryDirectory() as folder:
        dropped = found(Path(folder), training, tests, language)
    result: dict[str, float] = {"tests": len(tests), "training": len(training)}
    for low, high in ((0.8, 0.9), (0.9, 1.01)):
        wanted = telling & (similar >= low) & (similar < high)
        result |= {f"alike from {low}": int(wanted.sum()), f"found from {low}": int((wanted & dropped).sum())}
    wrong = dropped & (similar < _SIMILARITY)
    return {**result, "dropped, not alike": int(wrong.sum()), "alike, but too short": int(short.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    results = {}
    for language, texts in translations(parser.parse_args()).items():
        results[language] = measure(language, [text for text in texts if len(text) >= 12])
        print(language, json.dumps(results[language]), flush=True)
    write("decontamination", machine("numpy"), {"similarity": _SIMILARITY, "telling": TELLING}, results)


if __name__ == "__main__":
    main()
