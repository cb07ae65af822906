"""Errors of the input, which a caller may catch to go on."""


class ImageError(ValueError):
    """An image that cannot be used: unreadable, truncated, too large or of an unknown kind. The message names it."""


class WeightsError(ValueError):
    """Weights that do not fit the tower that their configuration describes. The message names the keys."""
