"""Notices what does not end, such as a collective that waits for a lost host, and shows where every thread stands."""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0  # of the block that is open; the timer is Python's, one a process


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """In this block all stacks go to stderr whenever `seconds` pass without `feed`; 0: never. The timer needs no GIL."""
    global _seconds
    before, _seconds = _seconds, seconds
    faulthandler.cancel_dump_traceback_later()
    feed()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _seconds = before
        feed()


def feed() -> None:
    """Says that a step has ended, or an answer come. From any thread; outside of a block it does nothing."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, repeat=True, file=sys.__stderr__ or sys.stderr)
