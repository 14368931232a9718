"""Advantages where rounding, numbering or size of a group could betray them."""

import jax
import numpy as np
import pytest

from ares_jax.aepo.advantage import group_normalized


@pytest.mark.parametrize("baseline", ["grpo", "rloo"])
def test_equal_rewards_are_worth_nothing_in_float32_too(baseline):
    rewards = np.repeat(np.random.default_rng(0).uniform(0, 2, 64), 8).astype(np.float32)
    value = group_normalized(rewards, np.repeat(np.arange(64), 8), baseline=baseline)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_any_numbers_name_the_groups_in_any_order():
    rewards = np.array([1.0, 5.0, 0.0, 3.0, 7.0])
    expected = [2**-0.5, 2**-0.5, -(2**-0.5), -(2**-0.5), 0.0]
    for ids in ([10, -3, 10, -3, 99], [1, 0, 1, 0, 2], [7_000_000, 5, 7_000_000, 5, 6]):
        np.testing.assert_allclose(group_normalized(rewards, np.array(ids)), expected, atol=1e-5)
        np.testing.assert_allclose(jax.jit(group_normalized)(rewards, np.array(ids)), expected, atol=1e-5)
    wide = np.array([1, 2**32 + 1, 1, 2**32 + 1, 2**33 + 1])  # all the same in 32 bits
    np.testing.assert_allclose(group_normalized(rewards, wide), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [bool, int])
def test_rewards_may_be_verdicts(kind):
    value = group_normalized(np.array([1, 0, 0, 1, 1], kind), np.array([0, 0, 0, 0, 1]))
    np.testing.assert_allclose(value, [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2, 0], atol=1e-5)


def test_rloo_by_hand():
    """Rewards 1, 0, 0, 1: each minus the mean of the other three."""
    value = group_normalized(np.array([1.0, 0, 0, 1]), np.zeros(4, int), baseline="rloo")
    np.testing.assert_allclose(value, [2 / 3, -2 / 3, -2 / 3, 2 / 3], atol=1e-6)
    with pytest.raises(ValueError, match="baseline='mean'"):
        group_normalized(np.zeros(2), np.zeros(2, int), baseline="mean")
