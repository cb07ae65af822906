"""Synthetic long captions: a vision model describes images in thirty languages, and no request is paid for twice.

`plan` fills a ledger with requests, `run` (or the Batch API) sends them, `export` writes the accepted captions as a
data set. The ledger is one SQLite file that knows what was asked and answered, whenever a process is killed.
"""
