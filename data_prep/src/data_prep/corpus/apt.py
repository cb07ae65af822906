"""Fetches packages and package descriptions with apt, without root and without changing the system's state."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.corpus.deb import find_package, find_translations
from data_prep.errors import UserError
from data_prep.languages import LANGUAGES, OTHER_CODES

FONT = "fonts-noto-color-emoji"
CLDR = "unicode-cldr-core"
STAMPS = "tuxpaint-stamps-default"
HELP = "gnome-user-docs"
LETTERS = "fonts-dejavu-core"  # not part of the corpus; search result pictures are labelled with this font
PACKAGES = (FONT, CLDR, STAMPS, HELP)

_ELSEWHERE = (
    f"fetch {', '.join(PACKAGES[:-1])} and {PACKAGES[-1]} (https://packages.debian.org/bookworm/NAME, 'all') into a "
    "folder and pass `--packages DIR` (which names the others that are missing), or pass `--drawn` for a corpus that "
    "needs no packages"
)


def default_cache() -> Path:
    """Where packages are kept between runs: $XDG_CACHE_HOME/trilith or ~/.cache/trilith."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilith"


def fetch(cache: Path, packages: Iterable[str], *, translations: bool, log: Callable[[str], None]) -> Path:
    """Fetch the packages and, if asked for, apt's translations into `cache`, where they are missing; returns `cache`.

    apt reads the machine's sources and keys, but keeps its lists, cache and state in a temporary folder: the system's
    are not changed, root is not needed, and empty lists (in a container) or settings without translations do not
    matter.

    Raises:
        UserError: there is no apt, or it fails; the message says what to do instead.
    """
    missing = [name for name in packages if not (cache.is_dir() and find_package(cache, name))]
    wants_lists = translations and not (cache.is_dir() and "en" in find_translations(cache))
    if not missing and not wants_lists:
        log(f"packages: all in {cache}")
        return cache
    if shutil.which("apt-get") is None:
        raise UserError(f"there is no apt-get on this machine; {_ELSEWHERE}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            _fetch(cache, Path(scratch), missing, wants_lists, log)
    except OSError as error:
        raise UserError(f"{cache}: cannot be written ({error.strerror}); name another folder with --cache") from error
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
            raise UserError(f"apt-get download {name} left no .deb file; {_ELSEWHERE}")
        package.path.rename(cache / package.path.name)  # appears whole or not at all
    if wants_lists:
        found = find_translations(scratch / "lists")
        if "en" not in found:
            raise UserError(
                "apt found no Translation-en; pass `--without packages` to build without package descriptions"
            )
        for paths in [paths for language, paths in found.items() if language != "en"] + [found["en"]]:
            for path in paths:  # English last: if it is there, all are
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
                "#clear Acquire::Languages;",  # a list: the machine's own "none" would stay in it
                "Acquire::Languages { " + " ".join(f'"{code}";' for code in languages) + " };",
                'Acquire::GzipIndexes "false";',
                f'Dir::State "{scratch}/state";',
                f'Dir::State::lists "{scratch}/lists";',
                f'Dir::Cache "{scratch}/cache";',
                'APT::Sandbox::User "root";',  # as root, apt would switch to a user who may not write here
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
        raise UserError(
            f"`apt-get {' '.join(arguments)}` failed ({reason}); is there a network? Otherwise {_ELSEWHERE}"
        )
