import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import window_means, window_push, window_ring_init


def slow(entropy, mask, window):
    means, complete = np.zeros(entropy.shape), np.zeros(entropy.shape, bool)
    for b in range(entropy.shape[0]):
        for t in range(entropy.shape[1] - window + 1):
            if mask[b, t : t + window].all():
                means[b, t], complete[b, t] = np.mean(entropy[b, t : t + window].astype(np.float64)), True
    return means, complete


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12))
def test_means_equal_the_definition(seed, window, length):
    rng = np.random.default_rng(seed)
    entropy, mask = rng.exponential(size=(3, length)).astype(np.float32), rng.random((3, length)) < 0.8
    means, complete = window_means(jnp.array(entropy), jnp.array(mask), window)
    expected, where = slow(entropy, mask, window)
    np.testing.assert_array_equal(complete, where)
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_the_ring_agrees_bit_for_bit():
    rng = np.random.default_rng(0)
    entropy = rng.exponential(size=(5, 20)).astype(np.float32)
    lengths = np.array([20, 3, 4, 11, 1])
    mask = np.arange(20) < lengths[:, None]
    means, complete = window_means(jnp.array(entropy), jnp.array(mask), 4)
    ring = window_ring_init(5, 4)
    for t in range(20):
        ring, mean, ended = window_push(ring, jnp.array(entropy[:, t]), jnp.array(mask[:, t]))
        if t >= 3:
            np.testing.assert_array_equal(ended, complete[:, t - 3])
            np.testing.assert_array_equal(mean, means[:, t - 3])


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window=0"):
        window_means(jnp.ones((1, 3)), jnp.ones((1, 3), bool), 0)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_forms_agree_bit_for_bit_compiled_or_not_with_pauses(window, compiled):
    rng = np.random.default_rng(window)
    steps, rows = 30, 6
    active = rng.random((steps, rows)) < np.array([1.0, 0.9, 0.5, 0.2, 0.05, 0.0])
    entropy = rng.gamma(1.0, size=(steps, rows)).astype(np.float32)
    push = jax.jit(window_push) if compiled else window_push
    ring, ended = window_ring_init(rows, window), []
    for t in range(steps):
        ring, mean, complete = push(ring, jnp.array(entropy[t]), jnp.array(active[t]))
        ended.append((np.asarray(mean), np.asarray(complete)))
    means_at, complete_at = (np.stack(x) for x in zip(*ended, strict=True))
    assert not complete_at[~active].any()
    own, count = np.zeros((rows, steps), np.float32), active.sum(0)
    for row in range(rows):  # a paused row goes on where it was: its window is over its own tokens
        own[row, : count[row]] = entropy[active[:, row], row]
    mask = jnp.arange(steps) < count[:, None]
    for form in (window_means, jax.jit(window_means, static_argnums=2)):
        means, complete = (np.asarray(x) for x in form(jnp.array(own), mask, window))
        for row in range(rows):
            starts = max(count[row] - window + 1, 0)
            on = active[:, row]
            np.testing.assert_array_equal(means_at[on, row][window - 1 :], means[row, :starts])
            np.testing.assert_array_equal(complete_at[on, row][window - 1 :], complete[row, :starts])
