"""The error a user can act on: one line, no traceback."""


class UserError(Exception):
    """Bad input or environment. The message names the value, the limit and the remedy; commands print it and exit with 2."""


class BrokenOffError(Exception):
    """A client's `break_off` has ended what it was asked for."""


class Preempted(BaseException):
    """The process was told to go, and everything is saved: commands exit with 0, and the same command resumes.

    Not an `Exception`: it may come at any moment, and nothing but a command's end may catch it.
    """
