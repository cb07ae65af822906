"""How data under URLs is read."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from stage_trainer.recipe.values import STRICT, Float, Int


@dataclass(frozen=True, config=STRICT)
class RemoteConfig:
    """How data under URLs is read: a `corpus` or `path` that is https://…, s3://…, gs://…, hf://… or any other URL that
    fsspec opens.

    Whole shards are fetched into the folder `cache`, which all processes of a machine share, also those of other runs.
    Beyond `gigabytes` (None: no limit) the least recently read files are evicted. Up to `downloads` files are
    prefetched at once. If a server is silent for `timeout` seconds, a file is not whole after `deadline` seconds, or a
    request fails in a way that may pass, it is repeated up to `retries` times; manifests: `manifest_megabytes` at most.
    `pipe:COMMAND` is a shell command that prints the file whose name replaces its {name}; it needs `allow_pipe`.
    """

    cache: str = "~/.cache/trilith"
    gigabytes: Float | None = None
    downloads: Int = 8
    timeout: Float = 60.0
    deadline: Float = 3600.0
    retries: Int = 6
    manifest_megabytes: Float = 128.0
    allow_pipe: bool = False
