"""Fetching with apt, against an `apt-get` of our own: what it is asked, what is kept, what a user is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_prep.corpus.apt import default_cache, fetch
from data_prep.errors import UserError

FAKE = """#!/bin/sh
# apt-get -q -c CONFIG update | download NAME
echo "$@" >> "$LOG"
cp "$3" "$LOG.conf"
lists=$(sed -n 's/^Dir::State::lists "\\(.*\\)";/\\1/p' "$3")
case "$4" in
  update) [ -z "$FAIL" ] || { echo "E: $FAIL" >&2; exit 100; }
          for code in $CODES; do echo "Package: a" > "$lists/mirror_Translation-$code"; done ;;
  download) echo deb > "$5_1.0_all.deb" ;;
esac
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Puts the fake first in PATH; gives the file with its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "apt-get").write_text(FAKE)
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("CODES", "en de pt%5fBR")
    monkeypatch.setenv("FAIL", "")
    return tmp_path / "log"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_packages_and_translations_are_fetched_once_with_lists_of_our_own(apt, tmp_path):
    cache = tmp_path / "cache"
    said = []
    for _ in range(2):
        assert fetch(cache, ["one", "two"], translations=True, log=said.append) == cache
    lists = [f"mirror_Translation-{code}" for code in ("de", "en", "pt%5fBR")]
    assert names(cache) == [*lists, "one_1.0_all.deb", "two_1.0_all.deb"]
    assert [line.split()[3:] for line in apt.read_text().splitlines()] == [
        ["update"],
        ["download", "one"],
        ["download", "two"],
    ]
    assert said[-1] == f"packages: all in {cache}"
    config = Path(f"{apt}.conf").read_text()
    assert "#clear Acquire::Languages;" in config
    assert '"zh_CN";' in config
    for key in ("Dir::State", "Dir::State::lists", "Dir::Cache"):
        assert f'{key} "{cache}/fetch-' in config


def test_only_what_is_missing_is_fetched_and_lists_only_when_asked_for(apt, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/one_1.0_all.deb").write_text("deb")
    fetch(tmp_path / "cache", ["one", "two"], translations=False, log=lambda line: None)
    assert names(tmp_path / "cache") == ["one_1.0_all.deb", "two_1.0_all.deb"]
    assert "download one" not in apt.read_text()
    assert 'Acquire::Languages { "none"; };' in Path(f"{apt}.conf").read_text()


def test_a_failing_apt_gives_its_own_reason_and_the_ways_out(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "Could not resolve 'deb.debian.org'")
    with pytest.raises(UserError, match=r"Could not resolve 'deb\.debian\.org'.*`--packages DIR`.*`--drawn`"):
        fetch(tmp_path / "cache", ["one"], translations=True, log=lambda line: None)
    assert names(tmp_path / "cache") == []


def test_an_apt_without_descriptions_names_the_option_to_go_without(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("CODES", "")
    with pytest.raises(UserError, match="`--without packages`"):
        fetch(tmp_path / "cache", ["one"], translations=True, log=lambda line: None)


def test_a_machine_without_apt_is_told_which_packages_to_fetch_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no apt-get.*fonts-noto-color-emoji, unicode-cldr-core, .*gnome-user-docs"):
        fetch(tmp_path / "cache", ["one"], translations=True, log=lambda line: None)


def test_cache_follows_the_xdg_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "trilith"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/trilith"
