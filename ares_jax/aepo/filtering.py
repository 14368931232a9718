"""Online filtering: a group whose leaves all earn the same teaches nothing."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ares_jax.sampling.rollout_tree import RolloutTree

FILTERS = ("accuracy", "reward")


def keep_group(mean: float, *, low: float, high: float) -> bool:
    """Says whether a group's mean lies within the bounds (method.md: 0.01 and 0.99)."""
    return low <= mean <= high


def keep_tree(tree: RolloutTree, filtering: ConfigDict) -> bool:
    """Says whether a tree's leaves teach something: by how many are right, or by their mean overall reward.

    The paper's wording is the reward; but shaping can push a group with one right leaf below the bound.
    """
    mean = tree.accuracy if filtering.by == "accuracy" else float(tree.overall.mean())
    return keep_group(mean, low=filtering.low, high=filtering.high)


def pass_rate_histogram(pass_rates: Sequence[float], group_size: int) -> str:
    """Returns "0/8: 12, 1/8: 3, ...": how many groups had so many right leaves. For the error of a batch never filled."""
    counts = np.bincount(np.rint(np.asarray(pass_rates) * group_size).astype(int), minlength=group_size + 1)
    return ", ".join(f"{right}/{group_size}: {count}" for right, count in enumerate(counts))
