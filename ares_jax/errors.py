"""The error a user can act on: one line, no traceback."""


class UserError(Exception):
    """Bad input or environment. The message names the value, the limit and the remedy; commands print it and exit with 2."""
