"""A run from its start to its end: the loop, its ranks, checkpoints, health, held-out figures, what is written down."""
