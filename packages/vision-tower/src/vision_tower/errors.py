"""Errors that are the input's fault, so that a caller can catch them and go on."""


class ImageError(ValueError):
    """An image that cannot be used: unreadable, truncated, too large or of an unknown kind. The message names it."""


class WeightsError(ValueError):
    """Weights that do not fit the tower which their configuration describes. The message names the keys."""
