"""Turns public data into the shards that the trainer reads.

Packages, from the ground up: `shards` is the format (standard library alone); `execute` runs long work in units;
`sources` imports what others publish; `curation` filters and rewrites data sets; `corpus` builds the laptop corpus;
`negatives` and `captions` add hard negatives and synthetic captions; `inspection` validates and shows data sets;
`commands` holds the subcommands of `data-prep`. Nothing is imported here, so that a trainer that reads shards loads no
imaging library.
"""

__all__: list[str] = []
