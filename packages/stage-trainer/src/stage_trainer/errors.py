"""The exceptions that the console commands show as a message instead of a traceback."""


class UserError(ValueError):
    """Something that the person at the keyboard can mend: a recipe, a path, a missing stage.

    The text says what was found, what was expected and what to do next.
    """


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved a checkpoint to go on from."""

    EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, start again later
