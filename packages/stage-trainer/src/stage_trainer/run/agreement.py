"""Ranks compare what has to be the same on all of them: the recipe, where they meet, and then the data."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from stage_trainer.errors import UserError

_RECIPE = (
    "start with bash launch/stageN.sh and name the recipe with --recipe: variables such as RECIPE do not reach other "
    "machines by themselves, and the file has to be the same on all of them"
)
_DATA = "copy the data sets again, so that every machine has the same"


def check_same_recipe(
    store: Store, rank: int, world: int, mine: Mapping[str, object], refusal: UserError | None = None
) -> None:
    """Ends all ranks if one has another recipe than rank 0, or cannot start for another reason. Rank 0 says why, the
    others leave in silence.

    Args:
        store: where all ranks are, those of other recipes among them.
        mine: this rank's recipe and stage, flat.
        refusal: why this rank cannot start.

    Raises:
        UserError: on rank 0, or on a rank that comes when the others have agreed without it.
        SystemExit: on the others.
    """
    if rank == 0:
        store.set("recipe", json.dumps({"host": platform.node(), **mine}, default=str))
    theirs = json.loads(_wait_for(store, "recipe"))
    problem = str(refusal or "") or difference("recipe", (rank, platform.node(), mine), (theirs.pop("host"), theirs))
    store.set(f"recipe/{rank}", problem)
    if rank == 0:
        found = [_wait_for(store, f"recipe/{other}") for other in range(world)]
        store.set("recipe/verdict", next(filter(None, found), ""))
    verdict = _wait_for(store, "recipe/verdict")
    if rank == 0 and verdict:
        while store.add("recipe/read", 0) < world - 1:  # the store goes with this process
            time.sleep(0.02)
        raise UserError(verdict)
    if verdict:
        store.add("recipe/read", 1)
        raise SystemExit(2)
    if problem:
        raise UserError(problem)


def check_same_data(fingerprint: Mapping[str, str]) -> None:
    """UserError on all ranks if one has other data than rank 0; every rank has to call."""
    world = dist.get_world_size()
    found: list[Any] = [None] * world
    if world > 1:
        dist.all_gather_object(found, (platform.node(), dict(fingerprint)))
    for rank, (host, theirs) in enumerate(found[1:], start=1):
        if text := difference("data", (rank, host, theirs), found[0], _DATA):
            raise UserError(text)


def machines() -> tuple[int, int]:
    """(the number of this rank's machine, how many there are), in the order of their first ranks; every rank has to
    call."""
    found: list[Any] = [platform.node()] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, platform.node())
    names = list(dict.fromkeys(found))
    return names.index(platform.node()), len(names)


def difference(
    what: str,
    one: tuple[int, str, Mapping[str, object]],
    first: tuple[str, Mapping[str, object]],
    remedy: str = _RECIPE,
) -> str:
    """A sentence on the first key whose value is not rank 0's; "" if there is none.

    Args:
        what: is compared.
        one: a rank, its machine and its values.
        first: rank 0's machine and its values.
        remedy: what to do.
    """
    rank, host, mine = one
    host_of_first, theirs = first
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        own, other = json.loads(json.dumps(mine.get(key), default=str)), theirs.get(key)
        if own != other:
            return (
                f"rank {rank} (on {host}) has another {what} than rank 0 (on {host_of_first}): its {key} is {own!r}, "
                f"and that of rank 0 is {other!r}; {remedy}"
            )
    return ""


def _wait_for(store: Store, key: str) -> str:
    while not store.check([key]):  # in Python, where signals are handled; `limits.start` ends it
        time.sleep(0.02)
    return store.get(key).decode()
