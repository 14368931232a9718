"""Online filtering."""

import math

from ares_jax.aepo.filtering import keep_group, pass_rate_histogram


def test_groups_that_teach_nothing_are_dropped():
    kept = [keep_group(mean, low=0.01, high=0.99) for mean in (-0.2, 0.0, 0.01, 0.5, 0.99, 1.0, math.nan)]
    assert kept == [False, False, True, True, True, False, False]


def test_histogram():
    assert pass_rate_histogram([0.0, 1 / 3, 1.0, 1.0], 3) == "0/3: 1, 1/3: 1, 2/3: 0, 3/3: 2"
    assert pass_rate_histogram([], 2) == "0/2: 0, 1/2: 0, 2/2: 0"
