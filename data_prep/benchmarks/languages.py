"""Languages of texts without a label: how many are found, left undetermined, or taken for another, in each language.

    python data_prep/benchmarks/languages.py --declaration package/declaration --messages python

The texts are those of `translations.py`, on which no rule was written. `data-prep languages` writes what is "right" or
"wrong" here, and drops what is "undetermined". Writes `results/languages.json`.
"""

from __future__ import annotations

import argparse
from collections import Counter

from common import machine, write
from data_prep.curation.language_id import identify
from data_prep.curation.relabel import SURE
from translations import add_arguments, translations

_LENGTHS = {"12 to 39 characters": (12, 39), "40 characters or more": (40, 1000)}


def count(texts: list[str], language: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for text in texts:
        code, probability = identify(text, among_all=True)
        verdict = "undetermined" if probability < SURE else "right" if code == language else f"wrong: {code}"
        counts[verdict] += 1
    return {"texts": len(texts), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    known = translations(parser.parse_args())
    results = {
        name: {
            language: count([text for text in texts if low <= len(text) <= high], language)
            for language, texts in known.items()
        }
        for name, (low, high) in _LENGTHS.items()
    }
    for name, table in results.items():
        print(name)
        for language, counts in table.items():
            determined = counts["texts"] - counts.get("undetermined", 0)
            print(f"  {language}  {counts.get('right', 0) / determined:8.2%} of {determined} determined; {counts}")
    write("languages", machine("py3langid", "lingua-language-detector"), {"sure": SURE}, results)


if __name__ == "__main__":
    main()
