import errno
import os

import pytest
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory


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
