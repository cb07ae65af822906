"""Hard negatives: for each query, texts that a model takes for answers and that are none."""

from .mining import Guards, mine_negatives

__all__ = ["Guards", "mine_negatives"]
