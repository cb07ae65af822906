"""What a metric means: declared by the code that measures it, not read off its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A metric of a run on held-out data.

    Attributes:
        higher_is_better: false for a loss, or for a distance that should be small.
        headline: over all languages and at the full width; one of the few that people look at first.
    """

    higher_is_better: bool = True
    headline: bool = False
