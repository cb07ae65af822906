"""The exceptions that the console commands show as a message instead of a traceback."""


class UserError(ValueError):
    """Something that the person at the keyboard can mend: a recipe, a path, a missing stage.

    The text says what was found, what was expected and what to do next.
    """


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved a checkpoint to go on from."""

    EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, start again later


def speaks_for_itself(error: BaseException) -> bool:
    """Whether an error's text is all that a person needs: ours, and those of the towers, the losses and the data."""
    ours = ("stage_trainer", "data_prep", "text_tower", "vision_tower", "contrastive_losses")
    named = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ours
    return named or isinstance(error, FileNotFoundError)
