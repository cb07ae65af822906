"""Shards that a recipe names one by one, `{00000..41455}.tar`: webdataset's tars as they are, without sidecars."""

from __future__ import annotations

import hashlib
import io
import os
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

import torch
from data_prep.shards import Unusable, content_of, with_named_captions
from vision_tower import ImageError, load_pixels

from stage_trainer.data.config import DataConfig
from stage_trainer.data.drawn import Corrupt, Drawn, Position
from stage_trainer.data.lanes import UncountedOrder, spread
from stage_trainer.data.ranges import RangedFile
from stage_trainer.data.samples import REPLACEMENTS, image_of
from stage_trainer.data.stateless_rng import key, permutation
from stage_trainer.data.streamed_lane import StreamedLane, StreamedShard
from stage_trainer.errors import UserError
from stage_trainer.recipe import Source
from stage_trainer.recipe.address import is_remote, without_credentials


class StreamedShards:
    """Captioned images out of plain shards, which are read in sequence.

    The shards are dealt out to lanes (`StreamedLane`), and each batch takes equally many samples from each; of which
    rank and which process a lane is, does not matter to what is in it.

    Args:
        config: where data are and how they are read.
        source: `path` names the shards, in webdataset's notation.
        number: of the source, in its task; with `seed` it determines the order.
        lanes: how many; of fewer shards each is one.

    Attributes:
        kind, source: as those of a data set with sidecars; the source is called as its shards' folder.
        fingerprint: hash of the shards' names.
        order: which sample a turn shows.

    Raises:
        UserError: webdataset is missing; a shard of this machine is missing; a name that says no shards.
    """

    kind = "image-short"

    def __init__(self, config: DataConfig, source: Source, number: int, seed: int, lanes: int):
        self.config, self.settings, self.number = config, source, number
        places = _expanded(config, source.path)
        self.names = [without_credentials(place) for place in places]
        self.source = Path(self.names[0]).parent.name or "shards"
        self.fingerprint = hashlib.sha256("\n".join(n.rpartition("/")[2] for n in self.names).encode()).hexdigest()
        self.fetched = 0
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.order = UncountedOrder(min(lanes, len(places)))
        shards = [
            StreamedShard(name, partial(self._open, place)) for name, place in zip(self.names, places, strict=True)
        ]
        row, turns = permutation(len(shards), key("lanes")), spread(self.order.lanes).tolist()
        bounds = [lane * len(shards) // self.order.lanes for lane in range(self.order.lanes + 1)]
        self._lanes = [
            StreamedLane(
                [shards[n] for n in row[bounds[lane] : bounds[lane + 1]]],
                key(seed, "streamed", number, lane),
                source.shuffle_buffer,
                (1 + turns[lane]) / self.order.lanes,
            )
            for lane in range(self.order.lanes)
        ]

    def sample(self, index: int, drawn: Drawn) -> tuple[torch.Tensor, dict[str, Any]]:
        """(uint8 pixels `[3, H, W]`, the texts) of a sample, or of the one of its block that takes its place.

        Args:
            drawn: gets the positions of lanes, and what is corrupt.

        Raises:
            UserError: hardly any sample can be used.
        """
        number, lane = divmod(index, self.order.lanes)
        reader = self._lanes[lane]
        block, place = reader.block(number)
        drawn.positions[self.number, lane] = reader.position
        if number == reader.position.first:  # of all processes that read the lane one draws this sample
            drawn.corrupt += reader.faults
        here = (block[(place + attempt) % len(block)] for attempt in range(len(block)))
        for sample in islice(chain(here, reader.following()), REPLACEMENTS):
            try:
                return self._decoded(sample)
            except ImageError as error:
                drawn.corrupt.append(Corrupt(sample["__url__"], sample["__key__"], str(error)))
            except Unusable as error:
                reason = f"{error} (the members of a sample have to stand together in its shard)"
                drawn.corrupt.append(Corrupt(sample["__url__"], sample["__key__"], reason))
        raise UserError(
            f"{self.settings.path}: {REPLACEMENTS} samples in a row were of no use, the last one because: "
            f"{drawn.corrupt[-1].reason}"
        )

    def go_on(self, lane: int, position: Position) -> None:
        """Where the reader of a lane may begin."""
        self._lanes[lane].go_on(position)

    def take_fetched(self) -> int:
        """The bytes that this process has fetched since the last call."""
        found, self.fetched = self.fetched, 0
        return found

    def _decoded(self, sample: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        members = {name: content for name, content in sample.items() if not name.startswith("__")}
        if self.settings.caption_key:
            members = with_named_captions(
                self.kind, members, [name.strip() for name in self.settings.caption_key.split(",")]
            )
            members.pop("txt", None)  # the recipe says where captions are
        if any(name.startswith("negative-0.") for name in members):
            raise UserError(
                f"{self.settings.path}: its samples have hard-negative images, which shards read without a manifest "
                "have no place for; name the folder of the data set"
            )
        content = content_of(self.kind, members)
        image = image_of(members)
        assert image is not None  # content_of guarantees it
        name = f"{sample['__url__']}, sample {sample['__key__']}"
        pixels = load_pixels(image, name=name, max_pixels=self.config.max_pixels)
        return pixels, {"item": f"{sample['__url__']}/{sample['__key__']}", **content}

    def _open(self, place: str) -> IO[bytes]:
        if not is_remote(place):
            return open(place, "rb")  # the reader closes it
        if self._pool is None or self._pool[0] != os.getpid():  # threads are not forked
            self._pool = os.getpid(), ThreadPoolExecutor(self.config.remote.downloads)
        file = RangedFile(place, self.config.remote, self._pool[1], self._count)
        return cast(IO[bytes], io.BufferedReader(file, 2**16))

    def _count(self, fetched: int) -> None:
        self.fetched += fetched


def streamed_sources(config: DataConfig, sources: Sequence[Source], seed: int, lanes: int) -> dict[int, StreamedShards]:
    """Those of `sources` that name their shards, by their numbers.

    Raises:
        UserError: as `StreamedShards`; two that would have one name.
    """
    found = {
        number: StreamedShards(config, source, number, seed, lanes)
        for number, source in enumerate(sources)
        if source.names_shards
    }
    known = {(each.source, tuple(each.names)) for each in found.values()}
    for name, count in Counter(name for name, _ in known).items():
        if count > 1:
            raise UserError(
                f"data.image_text has {count} sources of shards in folders called {name!r}, and figures would not tell "
                "them apart; rename a folder, or name the shards of both in one path, with '::' between them"
            )
    return found


def _expanded(config: DataConfig, path: str) -> list[str]:
    """The shards of a path, each a file or a URL."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise UserError(
            f"{path} names shards without a manifest, which webdataset reads: pip install "
            "'trilith-stage-trainer[webdataset]'; or index them (data-prep index), and name the folder"
        ) from None
    try:
        expanded = expand_urls(path)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{without_credentials(path)}: is no list of shards ({error}); expected braces like {{00000..00099}}.tar"
        ) from error
    places = [_placed(config, each) for each in expanded]
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise UserError(f"{without_credentials(path)} names {without_credentials(twice[0])} more than once")
    missing = [place for place in places if not is_remote(place) and not Path(place).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(places)} shards of {path} are not there, the first is {missing[0]}; name only "
            "those that are"
        )
    return places


def _placed(config: DataConfig, path: str) -> str:
    """A shard of a recipe: below the split of its corpus, unless its path is absolute or a URL."""
    if path.startswith("pipe:") or (config.corpus.startswith("pipe:") and not os.path.isabs(path)):
        raise UserError(
            "shards without a manifest cannot be read through pipe:, which cannot go on in the middle; name their "
            "https://, s3:// or gs:// address"
        )
    if is_remote(path) or os.path.isabs(path):
        return path
    if is_remote(config.corpus):
        base = urllib.parse.urlsplit(config.corpus)
        return base._replace(path=f"{base.path.rstrip('/')}/train/{path}").geturl()
    return str(Path(config.corpus) / "train" / path)
