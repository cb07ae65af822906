import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from stage_trainer.errors import UserError
from stage_trainer.files import free_name, whole_directory, write_whole


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    def fail_half_way():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with whole_directory(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "file").read_text() == "x"


def test_what_exists_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"), whole_directory(tmp_path / "out"):
        pass


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="No space left on device; free some space"), whole_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_disk(monkeypatch):
    """What was done to files, in order: ("fsync", path, bytes in it) and ("rename", from, to)."""
    done = []
    fsync = os.fsync

    def synced(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(("fsync", path, path.stat().st_size if path.is_file() else None))
        fsync(handle)

    def renamed(how):
        def rename(source, target, **options):
            done.append(("rename", Path(source), Path(target)))
            how(source, target, **options)

        return rename

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed(getattr(os, name)))
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_all_that_was_written_is_on_disk_before_the_rename_and_the_rename_after(tmp_path, on_disk):
    """A power cut leaves the whole directory, or none."""
    with whole_directory(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        for name in ("one", "sub/two"):
            (partial / name).write_text("x" * 10_000)
    temporary = tmp_path / ".out.partial"
    moment = on_disk.index(("rename", temporary, tmp_path / "out"))
    before, after = on_disk[:moment], on_disk[moment + 1 :]
    for name in ("one", "sub/two"):
        assert ("fsync", temporary / name, 10_000) in before
    for directory in (temporary, temporary / "sub"):
        assert ("fsync", directory, None) in before
    assert ("fsync", tmp_path, None) in after
    assert sum(what == "rename" for what, *_ in on_disk) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_file_is_on_disk_before_it_takes_the_place_of_another(tmp_path, on_disk):
    write_whole(tmp_path / "best.json", "old")
    on_disk.clear()
    write_whole(tmp_path / "best.json", "the new one")
    synced, renamed, directory = on_disk
    assert synced == ("fsync", renamed[1], len("the new one"))
    assert (renamed[0], renamed[1].parent, renamed[2]) == ("rename", tmp_path, tmp_path / "best.json")
    assert directory == ("fsync", tmp_path, None)
    assert (tmp_path / "best.json").read_text() == "the new one"


def test_what_does_not_reach_the_disk_takes_no_place(tmp_path, monkeypatch):
    write_whole(tmp_path / "best.json", "old")

    def fails(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match="Input/output error"):
        write_whole(tmp_path / "best.json", "new")
    with pytest.raises(UserError, match="Input/output error"), whole_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"best.json"}
    assert (tmp_path / "best.json").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("it broke"), "could not write .*out: it broke; free some space"),
        (OSError(errno.EACCES, "Permission denied"), "could not write .*out: Permission denied; free some space"),
        (OSError("in words alone"), "could not write .*out: in words alone; free some space"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_message_whoever_says_it(tmp_path, error, words):
    def write_half():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(UserError, match=words):
        write_half()
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_not_taken_over(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/old").write_text("x")
    with whole_directory(tmp_path / "out") as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_text_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "one")
    write_whole(tmp_path / "file", "zwölf")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwölf"

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="file: No space left on device"):
        write_whole(tmp_path / "file", "three")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwölf"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_free_name_is_the_first_that_nothing_has(tmp_path):
    assert free_name(tmp_path / "a", "old") == tmp_path / "a.old-1"
    for number in (1, 2, 4):
        (tmp_path / f"a.old-{number}").touch()
    assert free_name(tmp_path / "a", "old") == tmp_path / "a.old-3"
