"""Hard negatives: for each query, texts that a model takes for answers and that are none."""

from data_prep.negatives.guards import Guards
from data_prep.negatives.mining import Embedding, mine_negatives

__all__ = ["Embedding", "Guards", "mine_negatives"]
