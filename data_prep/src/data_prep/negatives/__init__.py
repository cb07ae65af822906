"""Hard negatives: for each query, texts that a model ranks high and that are no answers."""

from data_prep.negatives.guards import Guards
from data_prep.negatives.mining import Embedding, mine_negatives

__all__ = ["Embedding", "Guards", "mine_negatives"]
