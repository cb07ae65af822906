"""Turns public data into the shards that the trainer reads.

`data_prep.shards` is the format (standard library alone); `data_prep.corpus` builds the laptop corpus; the command
`data-prep` runs it. Nothing is imported here, so that a trainer that reads shards loads no imaging library.
"""

__all__: list[str] = []
