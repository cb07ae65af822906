import errno
import fcntl

import pytest
from stage_trainer.data.shard_cache import CacheFolder, try_lock
from stage_trainer.errors import UserError


def test_a_cache_on_a_file_system_without_locks_is_refused_with_what_to_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for ask in (lambda: CacheFolder(tmp_path, 1.0).clear(), lambda: try_lock(tmp_path / ".lock")):
        with pytest.raises(UserError, match=r"no locks \(No locks available\); name a folder on another one"):
            ask()
