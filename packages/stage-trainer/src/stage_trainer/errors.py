"""Exceptions that the console commands show as a message instead of a traceback."""


class UserError(ValueError):
    """Something that the user can correct: a recipe, a path, a missing stage.

    The text says what was found, what was expected and what to do next.
    """


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved a checkpoint to resume from."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start again later


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message is all that the user needs: errors of our packages, and files that are missing."""
    ours = ("stage_trainer", "data_prep", "text_tower", "vision_tower", "contrastive_losses")
    named = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ours
    return named or isinstance(error, FileNotFoundError)
