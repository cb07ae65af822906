"""Notes that the ranks of one machine leave in the run's folder, so that only one of them prints a message."""

from __future__ import annotations

import hashlib
from pathlib import Path


def first_to_say(folder: Path, text: str) -> bool:
    """Leaves a note that `text` is printed; False if another rank has left it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note_of(folder, text).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # on a full disk print it rather twice than not at all
        return True
    return True


def note_of(folder: Path, text: str) -> Path:
    """The file whose existence means that `text` was printed."""
    return folder / f".failure-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
