"""What a figure means: told by what measures it, before it measures, and never read off its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A figure that a run takes on held-out data.

    Attributes:
        higher_is_better: of a loss, or a distance that should be small, it is not.
        headline: over all languages and at the full width: one of the few that a person wants first.
    """

    higher_is_better: bool = True
    headline: bool = False
