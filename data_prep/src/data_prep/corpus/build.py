"""Builds a corpus: read, split, train the tokenizer, write the shards, publish all at once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from data_prep.corpus import apt
from data_prep.corpus.debian import Material, needed_packages, read_material
from data_prep.corpus.drawn import draw_material
from data_prep.corpus.items import ImageItem, Settings, TextItem
from data_prep.corpus.split import SPLITS, drop_identical, families, leaks, similar_pairs, split_items
from data_prep.corpus.writing import train_tokenizer, training_texts, write_datasets
from data_prep.curation.tokens import TokenCounter
from data_prep.errors import UserError
from data_prep.shards import Dataset, ShardError, alone
from data_prep.shards.files import read_object, sync, write_file
from data_prep.shards.format import JsonObject, check_new_folder

CORPUS_VERSION = 2
"""Raised when the same packages and settings give other bytes."""


def build_corpus(
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    packages: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> JsonObject:
    """Build the corpus in the folder `out`; returns the content of `corpus.json`.

    If `out` already holds a corpus of this version and these settings, nothing is done. Otherwise everything is written
    to `out.partial`, which is renamed at the end.

    Args:
        packages: a folder of .deb files (and Translation-xx lists); without it apt fetches them into `cache`.
        cache: where fetched packages are kept; $XDG_CACHE_HOME/trilith by default.
        workers: threads that draw; the number of cores by default. The bytes do not depend on it.
        log: called with one line at each step.

    Raises:
        UserError: `out` holds something else, packages are missing, or the disk refuses.
        ShardError: the disk refuses while a shard is written.
    """
    settings, out = settings or Settings(), check_new_folder(Path(out))
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: expected at least 1")
    existing = _existing(out, settings)
    if existing is not None:
        log(f"{out}: already built, with this version and these settings; nothing to do")
        return existing
    _check_libraries(settings)
    try:
        with alone(out.with_name(f".{out.name}.lock"), f"{out} is being built: it"):
            read = partial(_material, settings, packages, cache, workers or os.cpu_count() or 1, log)
            return _build(out, settings, read, log)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; fix it and run again") from error


def _build(out: Path, settings: Settings, read: Callable[[], Material], log: Callable[[str], None]) -> JsonObject:
    unfinished = out.with_name(out.name + ".partial")
    if unfinished.exists():
        log(f"{unfinished}: removing what an interrupted run left")
        shutil.rmtree(unfinished)
    started = time.monotonic()
    try:
        unfinished.mkdir(parents=True)  # first, so that a folder that cannot be written is reported at once
        corpus = _write(unfinished, settings, read(), log)
        unfinished.rename(out)
        sync(out.parent)
    except OSError as error:
        where = error.filename or unfinished
        raise UserError(f"{where}: {error.strerror or error}; free some space or fix it and run again") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for line in receipt(corpus):
        log(line)
    log(f"{out}: done in {time.monotonic() - started:.0f} s")
    return corpus


def receipt(corpus: JsonObject) -> list[str]:
    """The summary of a build: what came in, what was dropped and why, what went out, what leaks."""
    lines = ["", f"{'came in':<34}{'items':>9}"]
    lines += [f"  {source:<32}{count:>9}" for source, count in corpus["items"].items()]
    lines += ["", f"{'left out, and why':<34}"]
    for source, reasons in corpus["dropped"].items():
        lines += [f"  {source + ': ' + reason:<58}{count:>9}" for reason, count in reasons.items() if count]
    lines += [f"  {source}: the whole source, {reason}" for source, reason in corpus["left_out"].items()]
    lines += ["", f"{'went out':<26}{'train':>12}{'validation':>12}{'test':>12}"]
    for name in sorted(set().union(*corpus["samples"].values())):
        lines.append(f"  {name:<24}" + "".join(f"{corpus['samples'][split].get(name, 0):>12}" for split in SPLITS))
    for split, leak in corpus["leaks"].items():
        lines.append(
            f"{split} names that also name something in training, in the same language: "
            f"{leak['texts']} of {leak['of_texts']} ({leak['english_texts']} in English)"
        )
    lines.append("")
    return lines


def _existing(out: Path, settings: Settings) -> JsonObject | None:
    """The corpus.json of the corpus in `out`; None if there is nothing, UserError if it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        corpus = read_object(out / "corpus.json")
        version, found = corpus["version"], dict(corpus["settings"])
        data_sets = [(split, name) for split, counts in corpus["samples"].items() for name in list(counts)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out}: exists and is no corpus (no readable corpus.json); name another folder") from error
    wanted = _plain(settings)
    if version != CORPUS_VERSION or found != wanted:
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        differences = [f"{key} {found.get(key)!r}, asked for {wanted[key]!r}" for key in changed]
        if version != CORPUS_VERSION:
            differences.insert(0, f"version {version!r}, this program writes {CORPUS_VERSION!r}")
        raise UserError(f"{out}: holds another corpus ({'; '.join(differences)}); remove it or name another folder")
    for split, name in data_sets:
        try:
            Dataset.open(out / split / name)
        except ShardError as error:
            raise UserError(f"{error} (or remove {out} and run again)") from error
    return corpus


def _check_libraries(settings: Settings) -> None:
    draws_svg = settings.drawn is None and "stamps" not in settings.without
    needed = ["sentencepiece", "resvg_py"] if draws_svg else ["sentencepiece"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: not installed; `pip install './data_prep[corpus]'` brings what is needed"
        )


def _material(
    settings: Settings,
    packages: str | os.PathLike[str] | None,
    cache: str | os.PathLike[str] | None,
    workers: int,
    log: Callable[[str], None],
) -> Material:
    if settings.drawn is not None:
        return draw_material(settings.drawn, seed=settings.seed, image_size=settings.image_size)
    if packages is not None:
        return read_material(Path(packages), settings, workers, log)
    directory = apt.fetch(
        Path(cache) if cache is not None else apt.default_cache(),
        [*needed_packages(settings.without), apt.LETTERS],
        translations="packages" not in settings.without,
        log=log,
    )
    return read_material(directory, settings, workers, log)


def _write(root: Path, settings: Settings, material: Material, log: Callable[[str], None]) -> JsonObject:
    came_in = Counter([item.source for item in material.images] + [item.source for item in material.texts])
    images, twins = drop_identical(material.images)
    material.dropped.setdefault("pictures", {})["the same picture as another"] = twins
    items: list[ImageItem | TextItem] = [*images, *material.texts]
    family_of = families(items, similar_pairs(images))
    where = split_items(items, family_of, held_out=material.held_out, seed=settings.seed)

    started = time.monotonic()
    texts = training_texts(images, material.texts, where)
    model = train_tokenizer(texts, vocab_size=settings.vocab_size or (16384 if settings.drawn is None else 384))
    write_file(root / "tokenizer.model", model)
    tokenizer = TokenCounter(root / "tokenizer.model")
    log(f"trained the tokenizer on {len(texts)} texts ({time.monotonic() - started:.0f} s)")

    for name, font in material.fonts.items():
        (root / "fonts").mkdir(exist_ok=True)
        write_file(root / "fonts" / name, font)

    started = time.monotonic()
    samples = write_datasets(root, images, material.texts, where=where, family_of=family_of, tokenizer=tokenizer)
    log(
        f"wrote {sum(sum(counts.values()) for counts in samples.values())} samples ({time.monotonic() - started:.0f} s)"
    )

    languages: dict[str, Counter[str]] = {}  # source → language → named items
    for item in images:
        languages.setdefault(item.source, Counter()).update({text.language for text in item.names})
    sizes = Counter(family_of[item.name] for item in images)
    corpus = {
        "version": CORPUS_VERSION,
        "settings": _plain(settings),
        "packages": material.packages,
        "made_with": library_versions(),
        "languages": {source: dict(sorted(counts.items())) for source, counts in sorted(languages.items())},
        "items": dict(came_in),
        "families": {"images": len(sizes), "largest": max(sizes.values(), default=0)},
        "dropped": material.dropped,
        "left_out": material.left_out,
        "samples": samples,
        "leaks": leaks(images, where),
        "tokenizer_sha256": tokenizer.sha256,
    }
    write_file(root / "corpus.json", (json.dumps(corpus, indent=1, ensure_ascii=False) + "\n").encode())
    return corpus


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that the bytes of a corpus depend on, besides its packages."""
    from PIL import features

    found: dict[str, str | None] = {}
    for name in ("pillow", "sentencepiece", "resvg-py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {name: features.version(name) for name in ("raqm", "freetype2", "zlib")}


def _plain(settings: Settings) -> JsonObject:
    """As corpus.json has them: a tuple is a list there."""
    return {**asdict(settings), "without": list(settings.without)}
