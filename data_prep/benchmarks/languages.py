"""Languages of texts without a label: how many are found, left undetermined, or taken for another, in each language.

    python data_prep/benchmarks/languages.py runs/corpus

The texts are those of the laptop corpus (`data-prep corpus`), 150 a language of 40 to 400 characters and as many of 12
to 39, by the rule of `data-prep languages`. Labels are the corpus's own: some translations of packages' descriptions
are English in truth, and count as wrong. Writes `results/languages.json`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from common import machine, write
from data_prep.curation.language_id import identify
from data_prep.curation.relabel import SURE
from data_prep.languages import LANGUAGES
from data_prep.shards import Dataset

_LENGTHS = ((12, 39), (40, 400))
_TEXTS = 150


def texts(corpus: Path) -> dict[tuple[str, tuple[int, int]], set[str]]:
    found: dict[tuple[str, tuple[int, int]], set[str]] = defaultdict(set)
    for folder in sorted(corpus.glob("*/text-pairs/*")):
        dataset = Dataset.open(folder)
        for number in range(len(dataset)):
            sample = json.loads(dataset.read(number)["json"])
            for text in [*sample["query"], *sample["target"]]:
                for low, high in _LENGTHS:
                    if low <= len(text["text"]) <= high:
                        found[text["language"], (low, high)].add(text["text"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    known, results = texts(parser.parse_args().corpus), {}
    for lengths in _LENGTHS:
        table = {}
        for language in LANGUAGES:
            drawn = sorted(known[language, lengths])
            drawn = random.Random(0).sample(drawn, min(_TEXTS, len(drawn)))
            counts: Counter[str] = Counter()
            for text in drawn:
                code, probability = identify(text, among_all=True)
                sure = probability >= SURE
                counts["undetermined" if not sure else "right" if code == language else f"wrong: {code}"] += 1
            table[language] = {"texts": len(drawn), **counts}
        results["{} to {} characters".format(*lengths)] = table
    for name, table in results.items():
        print(name, json.dumps(table, indent=1), sep="\n")
    write("languages", machine("py3langid", "lingua-language-detector"), {"sure": SURE}, results)


if __name__ == "__main__":
    main()
