"""What sizes are rounded up to, so that few shapes are compiled."""

import bisect
from collections.abc import Sequence


def bucket(value: int, largest: int, *, smallest: int = 16) -> int:
    """Returns the smallest of smallest, 2 x, 4 x, ... that holds `value`, at most `largest`."""
    size = smallest
    while size < value:
        size *= 2
    return min(size, largest)


def sizes(largest: int, unit: int) -> tuple[int, ...]:
    """Returns an eighth, a quarter, a half, three quarters and all of `largest`, in whole units, ascending."""
    whole = {min(largest, -(-largest * eighths // (8 * unit)) * unit) for eighths in (1, 2, 4, 6, 8)}
    return tuple(sorted(whole))


def smallest(ascending: Sequence[int], value: int) -> int:
    """Returns the first of the `ascending` sizes that holds `value`."""
    return ascending[bisect.bisect_left(ascending, value)]
