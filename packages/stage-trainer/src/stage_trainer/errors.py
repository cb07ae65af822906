"""The one exception that the console commands show as a message instead of a traceback."""


class UserError(ValueError):
    """Something that the person at the keyboard can mend: a recipe, a path, a missing stage.

    The text says what was found, what was expected and what to do next.
    """
