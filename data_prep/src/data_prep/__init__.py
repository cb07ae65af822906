"""Turns public data into the shards that the trainer reads.

`data_prep.shards` is the format (standard library alone). `data_prep.sources` imports what others publish,
`data_prep.execute` runs long work in units, `data_prep.looking` checks and shows what came out, `data_prep.corpus`
builds the laptop corpus; `data_prep.shaping`, `negatives` and `captions` make data better. The command `data-prep` runs
them. Nothing is imported here, so that a trainer that reads shards loads no imaging library.
"""

__all__: list[str] = []
