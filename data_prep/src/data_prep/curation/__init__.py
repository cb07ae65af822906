"""Shaping: what is taken out of data, held apart or put together before a model sees it."""
