"""A run from its start to its end: the loop, checkpoints, health, what is written down, and its ranks."""
