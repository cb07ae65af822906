"""Synthetic long captions: a vision model describes images in thirty languages, and nothing is paid for twice.

`plan` fills a ledger, `run` (or the Batch API) asks for what is planned in it, `export` writes what was accepted as a
data set. The ledger is one SQLite file; whatever is killed at whatever moment, it says what was asked and what came.
"""
