"""Text pairs with what a teacher says of them."""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.shards import Dataset, Unusable

from stage_trainer.data.taught import Said, first_in


class TaughtTexts(Said):
    """Text pairs; a sample has the teacher's embedding of the text that it reads."""

    of: ClassVar[str] = "texts"

    def questions(self, data: Dataset, index: int) -> list[Any]:
        """A sample's first text in the teacher's language. Errors as `Said.questions`."""
        content, language = self.cache.sample(data, index)[1], self.teacher.language
        if (found := first_in(language, [*content["query"], *content["target"]])) is None:
            raise Unusable(f"no text in {language!r}, which the teacher reads")
        return [found]
