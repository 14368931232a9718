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


def prompt_sizes(largest: int, page: int, chunk: int) -> tuple[int, ...]:
    """Returns the sizes that prompts are padded to: whole pages, and whole chunks (0: there are none) where one is cut."""
    whole = sizes(largest, page)
    return tuple(sorted({-(-size // chunk) * chunk if 0 < chunk < size else size for size in whole}))


def prompts_together(size: int, chunk: int, batch: int) -> int:
    """Returns how many prompts of a size go through the model together: one that is cut into chunks is work enough."""
    return 1 if 0 < chunk < size else batch


def smallest(ascending: Sequence[int], value: int) -> int:
    """Returns the first of the `ascending` sizes that holds `value`."""
    return ascending[bisect.bisect_left(ascending, value)]
