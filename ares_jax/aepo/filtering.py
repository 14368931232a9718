"""Online filtering: a group whose leaves all earn the same teaches nothing."""

from collections.abc import Sequence

import numpy as np


def keep_group(mean_reward: float, *, low: float, high: float) -> bool:
    """Says whether a group's mean overall reward lies within the bounds (method.md: 0.01 and 0.99)."""
    return low <= mean_reward <= high


def pass_rate_histogram(pass_rates: Sequence[float], group_size: int) -> str:
    """Returns "0/8: 12, 1/8: 3, ...": how many groups had so many right leaves. For the error of a batch never filled."""
    counts = np.bincount(np.rint(np.asarray(pass_rates) * group_size).astype(int), minlength=group_size + 1)
    return ", ".join(f"{right}/{group_size}: {count}" for right, count in enumerate(counts))
