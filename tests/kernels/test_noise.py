"""Threefry against the known answers of Random123; Gumbel noise against the moments of its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.noise import gumbel, threefry


@pytest.mark.parametrize(
    ("key", "counter", "first_word"),  # kat_vectors of the Random123 distribution, threefry2x32 20
    [
        ((0, 0), (0, 0), 0x6B200159),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0x1CB996FC),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
    ],
)
def test_known_answers(key, counter, first_word):
    words = [jnp.uint32(word) for word in (*key, *counter)]
    assert int(threefry(*words)) == first_word


def test_gumbel_moments_and_range():
    bits = jax.random.bits(jax.random.key(0), (1_000_000,), jnp.uint32)
    noise = np.asarray(gumbel(bits), np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6e6)
    assert abs(noise.var() - np.pi**2 / 6) < 0.02
    low, high = np.asarray(gumbel(jnp.array([2**32 - 1, 0], jnp.uint32)))
    assert -3 < low < -2.8 and 22 < high < 22.3


def test_large_values_are_distinct():
    """Where maxima over 150,000 tokens fall, neighbouring words still give different noise."""
    noise = np.asarray(gumbel(jnp.arange(0, 60_000, 2, dtype=jnp.uint32) + jnp.uint32(2**32 // 150_000)))
    assert len(np.unique(noise)) > 0.05 * len(noise)
    assert np.all(np.diff(noise) <= 0)
