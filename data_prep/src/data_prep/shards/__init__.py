"""The shard format that `data_prep` writes and `stage_trainer` reads: plain webdataset tars with an index beside each.

A *data set* is one directory::

    manifest.json        what it holds: schema, kind, source, shards with their counts, sizes and checksums
    00000.tar            a standard webdataset tar: KEY.json, KEY.png, …; readable by anyone's loader
    00000.index.jsonl    one line a sample, in tar order: key, member offsets and sizes, languages, tokens, hash

The index makes every sample addressable by number, so a sampler can be arithmetic and a resume exact. This package
needs the standard library alone.
"""

from data_prep.shards.content import Unusable, content_of, encodes, texts_in
from data_prep.shards.dataset import Dataset, Row
from data_prep.shards.files import sync, write_file
from data_prep.shards.format import KINDS, MANIFEST, SCHEMA, ShardError, ShardUnavailable, index_name
from data_prep.shards.lock import InUse, alone
from data_prep.shards.terminal import escaped_output
from data_prep.shards.writer import DatasetWriter, ShardWriter, write_manifest

__all__ = [
    "KINDS",
    "MANIFEST",
    "SCHEMA",
    "Dataset",
    "DatasetWriter",
    "InUse",
    "Row",
    "ShardError",
    "ShardUnavailable",
    "ShardWriter",
    "Unusable",
    "alone",
    "content_of",
    "encodes",
    "escaped_output",
    "index_name",
    "sync",
    "texts_in",
    "write_file",
    "write_manifest",
]
