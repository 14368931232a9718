"""The formulas that the host evaluates leaf by leaf: NumPy stays NumPy (nothing is compiled), and JAX agrees with it."""

import jax
import numpy as np
import pytest

from ares_jax.aepo.difficulty import bucket
from ares_jax.aepo.entropy_bonus import token_bonus
from ares_jax.aepo.kl import token_weights
from ares_jax.aepo.loss import reduction_weights
from ares_jax.aepo.reward import paper_entropy_reward, released_entropy_reward, updated_alpha

N = 64
RNG = np.random.default_rng(0)
COUNT, TARGET, MEAN, VARIANCE = RNG.uniform(0, 30, (4, N))
LEVEL, YES = RNG.integers(0, 3, N), RNG.random(N) < 0.5
TRIPLE = RNG.uniform(0, 2, 3)
CASES = {
    "released": (released_entropy_reward, (COUNT, TARGET, LEVEL, YES, TRIPLE[LEVEL])),
    "paper": (paper_entropy_reward, (COUNT, TARGET, LEVEL, YES, MEAN, VARIANCE)),
    "alpha": (updated_alpha, (TRIPLE, TRIPLE + [1, -9, np.nan], TRIPLE)),
    "bucket": (lambda k: bucket(k, 8), (np.arange(9),)),
    "bonus": (lambda means, mask: token_bonus(means, mask, 12.0, 0.3), (MEAN, YES)),
    "kl": (lambda kappa, level, inside: token_weights(kappa, level, inside, 0.4), (TRIPLE, LEVEL, YES)),
    "token": (lambda mask: reduction_weights(mask, "token"), (YES.reshape(4, -1),)),
    "seq": (lambda mask: reduction_weights(mask, "seq"), (YES.reshape(4, -1),)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_formula_in_two_places(name):
    function, inputs = CASES[name]
    host = function(*inputs)
    assert isinstance(host, np.ndarray)
    with jax.enable_x64(True):
        device = jax.jit(function)(*map(jax.numpy.asarray, inputs))
        assert isinstance(device, jax.Array)
        np.testing.assert_allclose(device, host, atol=1e-9)


def test_extreme_counts_overflow_nowhere():
    with np.errstate(all="raise", under="ignore"):
        value = released_entropy_reward(np.array([0.0, 1e6]), np.array([1e6, 0.0]), np.array([2, 2]), np.array([1, 1]), 0.5)
    np.testing.assert_allclose(value, [-0.3 * (650_000 - 2) / 350_004, 0.6], atol=1e-9)


def test_bonus_by_hand():
    """0.5 x log(1 + excess), inside validated windows and above the threshold only."""
    value = token_bonus(np.array([3.0, 3.0, 1.0]), np.array([True, False, True]), 2.0, 0.5)
    np.testing.assert_allclose(value, [0.5 * np.log(2), 0, 0])
