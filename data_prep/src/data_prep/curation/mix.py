"""What a model would see: the shares of data sets and languages, by the weights of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.errors import UserError
from data_prep.shards import Dataset


@dataclass
class Share:
    """A data set in the mix.

    share: of all draws. samples: their number. languages: samples by language; a sample with texts in n languages
    counts 1/n for each, since a trainer draws one. tokens: sum of the lengths of the longest texts, over the `counted`
    samples whose tokens are known.
    """

    directory: str
    kind: str
    share: float
    samples: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    counted: int = 0

    @property
    def mean_tokens(self) -> float | None:
        """Mean number of tokens of a sample's longest text."""
        return self.tokens / self.counted if self.counted else None


def mix(directories: Sequence[str], weights: Sequence[float] | None = None) -> list[Share]:
    """Read the sidecars of data sets; without `weights` each counts by its number of samples.

    Raises:
        UserError: not one positive weight for each data set.
    """
    if weights is not None and (len(weights) != len(directories) or not all(weight > 0 for weight in weights)):
        raise UserError(f"{len(directories)} data sets and weights {list(weights)}; expected one above 0 for each")
    shares = []
    for directory in directories:
        dataset = Dataset.open(directory)
        one = Share(directory, dataset.kind, 0.0, len(dataset))
        for number in range(len(dataset)):
            row = dataset.row(number)
            languages = row.languages or ("und",)
            for language in languages:
                one.languages[language] += 1 / len(languages)  # type: ignore[assignment]
            if row.tokens is not None:
                one.tokens, one.counted = one.tokens + row.tokens, one.counted + 1
        shares.append(one)
    parts = weights if weights is not None else [share.samples for share in shares]
    for share, part in zip(shares, parts, strict=True):
        share.share = part / sum(parts)
    return shares


def languages_of(shares: Sequence[Share]) -> dict[str, float]:
    """The share of each language in all draws, largest first."""
    total: Counter[str] = Counter()
    for one in shares:
        for language, count in one.languages.items():
            total[language] += one.share * count / one.samples  # type: ignore[assignment]
    return dict(sorted(total.items(), key=lambda entry: (-entry[1], entry[0])))
