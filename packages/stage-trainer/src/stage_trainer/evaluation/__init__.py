"""What is found of a model on held-out pools: retrieval, ranking, a picture."""
