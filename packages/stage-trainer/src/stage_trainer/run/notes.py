"""What the ranks of one machine leave each other in the run's folder, so that one of them says it for all."""

from __future__ import annotations

import hashlib
from pathlib import Path


def first_to_say(folder: Path, text: str) -> bool:
    """Leaves a note; False if somebody has said the same."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note_of(folder, text).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk is no reason to keep quiet
        return True
    return True


def note_of(folder: Path, text: str) -> Path:
    """The file that says that `text` was said."""
    return folder / f".failure-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
