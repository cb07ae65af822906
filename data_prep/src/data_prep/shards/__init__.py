"""The shard format that `data_prep` writes and `stage_trainer` reads: plain webdataset tars with a table beside each.

A *data set* is one directory::

    manifest.json        what it holds: schema, kind, source, shards with their counts, sizes and checksums
    shards.npy           the shards, where they are many, as a table in place of a list in manifest.json
    00000.tar            a standard webdataset tar: KEY.json, KEY.png, …; readable by anyone's loader
    00000.index.npy      its sidecar, a row a sample, in tar order: key, offsets and sizes, languages, tokens, hash

The sidecar makes every sample addressable by number, so a sampler can be arithmetic and a resume exact. Tables are
mapped: a process reads the pages that it needs, and shares them with all others. This package needs numpy alone, and
not before a data set is read or written.
"""

from data_prep.shards.content import Unusable, content_of, encodes, negative_images, texts_in, with_named_captions
from data_prep.shards.dataset import Dataset, OpenShard
from data_prep.shards.files import sync, write_file
from data_prep.shards.format import IMAGE_TRIPLETS, KINDS, MANIFEST, SCHEMA, ShardError, ShardUnavailable, index_name
from data_prep.shards.lock import InUse, alone
from data_prep.shards.manifest import Shard
from data_prep.shards.sidecar import Row
from data_prep.shards.terminal import escaped_output
from data_prep.shards.writer import DatasetWriter, ShardWriter, write_manifest

__all__ = [
    "IMAGE_TRIPLETS",
    "KINDS",
    "MANIFEST",
    "SCHEMA",
    "Dataset",
    "DatasetWriter",
    "InUse",
    "OpenShard",
    "Row",
    "Shard",
    "ShardError",
    "ShardUnavailable",
    "ShardWriter",
    "Unusable",
    "alone",
    "content_of",
    "encodes",
    "escaped_output",
    "index_name",
    "negative_images",
    "sync",
    "texts_in",
    "with_named_captions",
    "write_file",
    "write_manifest",
]
