"""What a rank is about to read of remote data: fetched ahead, held against the cache's limit, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from data_prep.shards import Dataset

from stage_trainer.data.lanes import SourceOrder
from stage_trainer.data.remote_data import RemoteDataset
from stage_trainer.data.sampler import TaskSampler
from stage_trainer.data.shard_cache import ranks_here
from stage_trainer.data.streamed import StreamedShards
from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig


def look_ahead(
    data_sets: Sequence[Dataset | StreamedShards], sampler: TaskSampler, number: int, rank: int, world: int
) -> None:
    """Tells remote data sets which shards a rank reads for batch `number` and next, so that they prefetch them."""
    if any(isinstance(data, RemoteDataset) for data in data_sets):
        for data, shards in zip(data_sets, sampler.shards_ahead(number, rank, world), strict=True):
            if isinstance(data, RemoteDataset):
                data.expect(shards, rank)


def fetch_sidecars(data_sets: Sequence[Dataset]) -> None:
    """Fetches all sidecars of remote data sets.

    Raises:
        ShardUnavailable, UserError: one cannot be fetched.
    """
    for data in data_sets:
        if isinstance(data, RemoteDataset):
            names = (data.shard(number).index for number in range(len(data.shards)))
            with ThreadPoolExecutor(data.settings.downloads) as pool:
                for _ in pool.map(data.fetch, names):
                    pass


def newly_fetched(data_sets: Sequence[Dataset | StreamedShards]) -> int:
    """Bytes of remote data that this process has fetched since it was last asked."""
    return sum(data.take_fetched() for data in data_sets if isinstance(data, RemoteDataset | StreamedShards))


FEW = 0.25
"""Of the samples of the shards that a stage would fetch, the share below which samples are fetched one by one."""


def choose_ranges(data_sets: Sequence[Dataset | StreamedShards], sampler: TaskSampler, batches: int) -> list[str]:
    """Sets which remote data sets are read by ranges, by how many samples the stage draws of them in all; gives a line
    about each of these.

    Args:
        batches: of the task, in the stage.
    """
    lines = []
    drawn, _ = sampler.bounds(batches)
    for data, order, samples in zip(data_sets, sampler.orders, drawn.tolist(), strict=True):
        if not isinstance(data, RemoteDataset) or not isinstance(order, SourceOrder) or data.settings.ranges != "auto":
            continue
        # A lane fetches the shards of its window, and of the next one as soon as it reads this one.
        whole = min(len(data), 2 * order.lanes * order.window * len(data) / np.count_nonzero(data.shards["samples"]))
        data.by_ranges = not data.address.is_pipe and samples < FEW * whole
        if data.by_ranges:
            lines.append(
                f"{data.address}: the stage draws {samples:,} samples of shards that hold {whole:,.0f}, so they are "
                "fetched one by one, by ranges (remote.ranges)"
            )
    return lines


def check_room(
    settings: RemoteConfig,
    read: Sequence[tuple[Sequence[Dataset | StreamedShards], TaskSampler | None]],
    rank: int,
    world: int,
) -> None:
    """UserError if the cache's limit is too small for the shards of a step and those that come next, of all ranks of
    this machine.

    Args:
        read: the data sets of each task, with the sampler that draws from them.
    """
    if settings.gigabytes is None:
        return
    shards: dict[RemoteDataset, set[int]] = {}
    for data_sets, sampler in read:
        if sampler is None:
            continue
        for other in ranks_here(rank):
            for data, ahead in zip(data_sets, sampler.shards_ahead(0, other, world), strict=True):
                if isinstance(data, RemoteDataset):
                    shards.setdefault(data, set()).update(ahead)
    needed = sum(data.bytes_of(list(numbers)) for data, numbers in shards.items())
    if needed > settings.gigabytes * 1e9:
        raise UserError(
            f"remote.gigabytes is {settings.gigabytes:g}, but a step and the windows of shards that come next need "
            f"{needed / 1e9:.3g}; set it higher, leave it out for no limit, or lower data.lanes"
        )
