"""Fetching packages and package descriptions with apt, as any user, without touching the system's own state."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.corpus.deb import find_package, find_translations
from data_prep.corpus.items import CorpusError
from data_prep.languages import LANGUAGES, OTHER_CODES

FONT = "fonts-noto-color-emoji"
CLDR = "unicode-cldr-core"
STAMPS = "tuxpaint-stamps-default"
HELP = "gnome-user-docs"
LETTERS = "fonts-dejavu-core"  # nothing is made of it; pictures of a search write their queries with it
PACKAGES = (FONT, CLDR, STAMPS, HELP)

_ELSEWHERE = (
    f"fetch {', '.join(PACKAGES[:-1])} and {PACKAGES[-1]} (https://packages.debian.org/bookworm/NAME, 'all') into a "
    "folder and say `--packages DIR`, or say `--drawn` for a corpus that needs no packages"
)


def default_cache() -> Path:
    """Where packages are kept between runs: $XDG_CACHE_HOME/trilith or ~/.cache/trilith."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilith"


def fetch(cache: Path, packages: Iterable[str], *, translations: bool, log: Callable[[str], None]) -> Path:
    """Make sure that `cache` holds the packages and, if asked for, apt's translations; returns it.

    apt reads the machine's sources and keys, but keeps its lists, its cache and its state in a temporary folder of
    ours: the system's own are not changed, no root is needed, and a machine whose lists are empty (a container) or
    whose settings leave the translations out will do. What is in the cache already is not fetched again.

    Raises:
        CorpusError: there is no apt here, or it fails; says what to do instead.
    """
    missing = [name for name in packages if not (cache.is_dir() and find_package(cache, name))]
    wants_lists = translations and not (cache.is_dir() and "en" in find_translations(cache))
    if not missing and not wants_lists:
        log(f"packages: all in {cache}")
        return cache
    if shutil.which("apt-get") is None:
        raise CorpusError(f"there is no apt-get on this machine; {_ELSEWHERE}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            _fetch(cache, Path(scratch), missing, wants_lists, log)
    except OSError as error:
        raise CorpusError(f"{cache}: cannot be written ({error.strerror}); name another folder with --cache") from error
    return cache


def _fetch(cache: Path, scratch: Path, missing: list[str], wants_lists: bool, log: Callable[[str], None]) -> None:
    config = _write_config(scratch, wants_lists)
    log("packages: asking apt what there is")
    _apt(config, scratch, "update")
    for name in missing:
        log(f"packages: fetching {name}")
        _apt(config, scratch, "download", name)
        package = find_package(scratch, name)
        if package is None:
            raise CorpusError(f"apt-get download {name} left no .deb file; {_ELSEWHERE}")
        package.path.rename(cache / package.path.name)  # appears whole or not at all
    if wants_lists:
        found = find_translations(scratch / "lists")
        if "en" not in found:
            raise CorpusError(
                "apt found no Translation-en; say `--without packages` to build without package descriptions"
            )
        for paths in [paths for language, paths in found.items() if language != "en"] + [found["en"]]:
            for path in paths:  # English last: its presence says that all are there
                path.rename(cache / path.name)
        log(f"packages: package descriptions in {len(found)} languages")


def _write_config(scratch: Path, wants_lists: bool) -> Path:
    others = [code for code, language in OTHER_CODES.items() if language in LANGUAGES]
    languages = [*LANGUAGES, *others] if wants_lists else ["none"]
    for folder in ("lists/partial", "cache/archives/partial", "state"):
        (scratch / folder).mkdir(parents=True)
    config = scratch / "apt.conf"
    config.write_text(
        "\n".join(
            [
                "#clear Acquire::Languages;",  # a list: without this, the machine's own "none" would stay in it
                "Acquire::Languages { " + " ".join(f'"{code}";' for code in languages) + " };",
                'Acquire::GzipIndexes "false";',
                f'Dir::State "{scratch}/state";',
                f'Dir::State::lists "{scratch}/lists";',
                f'Dir::Cache "{scratch}/cache";',
                'APT::Sandbox::User "root";',  # as root, apt would change to a user who may not write here
                "#clear APT::Update::Pre-Invoke;",
                "#clear APT::Update::Post-Invoke;",
                "#clear APT::Update::Post-Invoke-Success;",
                "",
            ]
        )
    )
    return config


def _apt(config: Path, directory: Path, *arguments: str) -> None:
    command = ["apt-get", "-q", "-c", str(config), *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace")
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = complaints[0] if complaints else f"exit status {done.returncode}"
        raise CorpusError(
            f"`apt-get {' '.join(arguments)}` failed ({reason}); is there a network? Otherwise {_ELSEWHERE}"
        )
