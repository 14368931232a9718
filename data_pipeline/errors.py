"""The error of bad data: a file, an image, a problem that a user can mend."""


class DataError(ValueError):
    """The message names the place, the value and the remedy; commands print it and exit with 2."""
