"""Exceptions that the console commands show as a message instead of a traceback."""

import errno

_OF_THE_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
    | {errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
)


class UserError(ValueError):
    """Something that the user can correct: a recipe, a path, a missing stage.

    The text says what was found, what was expected and what to do next.
    """


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved a checkpoint to resume from."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start again later


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message is all that the user needs: errors of our packages, and what a disk refuses."""
    ours = ("stage_trainer", "data_prep", "text_tower", "vision_tower", "contrastive_losses")
    named = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ours
    return named or (isinstance(error, OSError) and error.errno in _OF_THE_DISK)
