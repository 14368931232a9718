"""Online filtering."""

import math
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict

from ares_jax.aepo.filtering import keep_group, keep_tree, pass_rate_histogram


def test_groups_that_teach_nothing_are_dropped():
    kept = [keep_group(mean, low=0.01, high=0.99) for mean in (-0.2, 0.0, 0.01, 0.5, 0.99, 1.0, math.nan)]
    assert kept == [False, False, True, True, True, False, False]


def test_shaping_does_not_drop_a_group_with_one_right_leaf():
    """One of eight is right, and the wrong ones pay 0.2 each: the paper's wording would drop it."""
    tree = SimpleNamespace(accuracy=1 / 8, overall=np.array([1.0] + [-0.2] * 7))
    bounds = {"low": 0.01, "high": 0.99}
    assert keep_tree(tree, ConfigDict({"by": "accuracy", **bounds}))
    assert not keep_tree(tree, ConfigDict({"by": "reward", **bounds}))


def test_histogram():
    assert pass_rate_histogram([0.0, 1 / 3, 1.0, 1.0], 3) == "0/3: 1, 1/3: 1, 2/3: 0, 3/3: 2"
    assert pass_rate_histogram([], 2) == "0/2: 0, 1/2: 0, 2/2: 0"
