"""Errors that the user can fix."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(ValueError):
    """An error that the user can fix: a missing file, a wrong option, a full disk, a library not installed.

    The message says what was found, what was expected and what to do next; the command line prints it as one line.
    """


def needs(module: str, *, extra: str, what: str) -> Any:
    """Import a library of the extra `extra`; UserError if it is not installed, saying what needs it.

    The towers of the extra "models" are on no package index, so the command that is shown names their folders.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        towers = " ./packages/text-tower ./packages/vision-tower" if extra == "models" else ""
        raise UserError(
            f"{what} needs {name}, which is not installed ({error}); "
            f"`pip install './data_prep[{extra}]'{towers}` brings it"
        ) from error
