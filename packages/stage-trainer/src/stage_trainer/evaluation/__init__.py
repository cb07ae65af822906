"""What is found of a model: retrieval and ranking on held-out pools, tables, a picture."""
