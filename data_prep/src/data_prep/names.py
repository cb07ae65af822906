"""Names that become folders or files: the one place that says which may."""

from __future__ import annotations

import re

from data_prep.errors import UserError

# 200 characters leave room for what is put around it: ".NAME.0-of-1000.lock", "NAME.survey-0123456789ab".
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_OURS = re.compile(r".*\.(partial|lock|tmp|survey-.*)")  # unfinished work, which readers skip and the next run removes


def is_hidden(path: str) -> bool:
    """Whether a file is one that systems and tools leave beside data, or lies in such a folder: ._NAME, .DS_Store and
    __MACOSX of macOS, .cache, .git, .ipynb_checkpoints.
    """
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in path.split("/"))


def check_name(name: str, what: str) -> str:
    """`name` itself, if a folder or file may be called so: one step of a path, on any system.

    Raises:
        UserError: another one; the message begins with `what` it is the name of.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} {name[:80]!r}: expected letters, digits, '-', '_' and '.', as in a folder's name, the first a "
            "letter or digit, at most 200"
        )
    if _OURS.fullmatch(name):
        raise UserError(f"{what} {name!r}: unfinished work is called so; take another name")
    return name
