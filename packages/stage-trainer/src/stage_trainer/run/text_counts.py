"""Which texts a stage has drawn, and how many of them it cut."""

from __future__ import annotations

from collections.abc import Sequence


class TextCounts:
    """Texts drawn in a stage, by source (kind/source), and how many of them lost their end to `max_tokens`.

    Args:
        drawn, cut: the counts so far, which are updated.
    """

    ENOUGH = 256
    """Texts of a source that have to be seen before its share is reported."""

    def __init__(self, drawn: dict[str, int], cut: dict[str, int]):
        self.drawn, self.cut = drawn, cut
        self._told = {source for source in self.cut if self.cut[source] and self.drawn[source] >= self.ENOUGH}

    def count(self, sources: Sequence[str], counts: Sequence[int]) -> None:
        """Adds a step; `counts` are those of `Drawn.of_sources`, summed over ranks."""
        half = len(sources)
        for of_kind, new in ((self.drawn, counts[:half]), (self.cut, counts[half:])):
            for source, count in zip(sources, new, strict=True):
                of_kind[source] = of_kind.get(source, 0) + count

    def shares(self, cut: bool) -> dict[str, float]:
        """For TensorBoard: how often each source is drawn, and, if asked, what share of its texts is `cut`."""
        drawn = {source: count for source, count in self.drawn.items() if count}
        total = sum(drawn.values())
        seen = {f"texts_seen/{source}": count / total for source, count in drawn.items()}
        return seen | {f"texts_cut/{source}": self.cut[source] / count for source, count in drawn.items() if cut}

    def news(self, max_tokens: int, last: bool) -> list[str]:
        """Messages about cut texts: one for each source in a stage, once enough of its texts, or all, were seen."""
        lines = []
        for source, seen in self.drawn.items():
            if self.cut[source] and source not in self._told and (last or seen >= self.ENOUGH):
                self._told.add(source)
                lines.append(
                    f"{source}: {self.cut[source]:,} of its {seen:,} texts so far ({self.cut[source] / seen:.1%}) are "
                    f"longer than max_tokens {max_tokens}; their ends are cut off"
                )
        return lines
