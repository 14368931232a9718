"""Truncated sets that four candidates miss, sets of one, rows without a distribution, the vocabulary of Qwen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import sample_with_entropy
from kernels.sampling_xla import _largest, _largest_in_tiles
from tests.xla import OPTIMISED

BOTH = pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])


def identity_case(logits):
    """Returns a hidden state and a head that give these logits [B, V]."""
    return jnp.eye(len(logits)), jnp.array(np.asarray(logits).T, jnp.float32)


def test_draws_after_many_misses_follow_the_exact_distribution():
    """Three tokens of 301 are kept: four candidates of a nearly flat distribution almost never hold one."""
    logits = np.linspace(0.0, 0.3, 301)[None]
    hidden, head = identity_case(logits)
    draw = jax.jit(
        lambda key: sample_with_entropy(
            jnp.broadcast_to(hidden, (2000, 1)), head, key, temperature=0.1, top_k=jnp.int32(3), top_p=jnp.float32(1)
        )[0],
        compiler_options=OPTIMISED,
    )
    counts = sum(np.bincount(draw(key), minlength=301) for key in jax.random.split(jax.random.key(4), 100))
    assert counts[:-3].sum() == 0
    p = np.exp(logits[0, -3:] / 0.1)
    expected = 200_000 * p / p.sum()
    assert np.sum((counts[-3:] - expected) ** 2 / expected) < 13.8  # 2 degrees of freedom, p = .001


def test_a_row_does_not_round_otherwise_because_another_draws_again():
    hidden = jnp.array(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)
    head = jnp.array(np.random.default_rng(1).normal(size=(5000, 24)), jnp.float32) * 0.05
    draw = jax.jit(
        lambda top_k: sample_with_entropy(
            hidden, head, jax.random.key(2), temperature=0.9, top_k=top_k, top_p=jnp.float32(1)
        )
    )
    calm, busy = draw(jnp.zeros(16, jnp.int32)), draw(jnp.zeros(16, jnp.int32).at[3].set(2))
    for a, b in zip(calm, busy, strict=True):
        np.testing.assert_array_equal(np.delete(a, 3), np.delete(b, 3))


@BOTH
@pytest.mark.parametrize("setting", [dict(top_p=0.0, top_k=0), dict(top_p=1.0, top_k=1)])
def test_the_most_likely_token_is_never_truncated(implementation, setting):
    logits = np.random.default_rng(0).normal(size=(3, 600))
    hidden, head = identity_case(logits)
    token, _, _ = sample_with_entropy(
        hidden, head, jax.random.key(0), temperature=5.0, implementation=implementation, **setting
    )
    np.testing.assert_array_equal(token, logits.argmax(1))


@BOTH
@pytest.mark.parametrize("setting", [dict(top_p=0.0, top_k=0), dict(top_p=1.0, top_k=1)])
def test_equals_are_kept_together_and_the_first_is_the_greedy_one(implementation, setting):
    hidden, head = identity_case(np.array([[1.0, 3.0, 0.0, 3.0]] * 32))
    temperature = jnp.array([0.0] * 8 + [1.0] * 24)
    token, _, _ = sample_with_entropy(
        hidden, head, jax.random.key(0), temperature=temperature, implementation=implementation, **setting
    )
    assert set(np.asarray(token[:8])) == {1} and set(np.asarray(token[8:])) == {1, 3}


@BOTH
def test_a_row_without_a_distribution_ends_with_nan_and_harms_no_other(implementation):
    """A NaN would otherwise be drawn again for ever."""
    hidden = jnp.eye(2).at[0, 0].set(jnp.nan)
    _, log_prob, entropy = sample_with_entropy(
        hidden, jnp.ones((20, 2)).at[:, 0].set(0.0), jax.random.key(0), temperature=1.0, top_k=0, top_p=0.9,
        implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(np.isnan(log_prob), [True, False])
    np.testing.assert_array_equal(np.isnan(entropy), [True, False])
    _, log_prob, _ = sample_with_entropy(
        jnp.ones((1, 2)), jnp.ones((20, 2)), jax.random.key(0), temperature=1.0, top_k=0, top_p=0.9,
        banned=jnp.ones(20, bool), implementation=implementation,
    )  # fmt: skip
    assert np.isnan(log_prob[0])


@BOTH
@pytest.mark.parametrize("vocabulary", [1, 3])
def test_vocabularies_smaller_than_the_candidates(implementation, vocabulary):
    hidden, head = identity_case(np.zeros((4, vocabulary)))
    token, _, entropy = sample_with_entropy(
        hidden, head, jax.random.key(0), temperature=1.0, top_k=2, top_p=0.5, implementation=implementation
    )
    assert (np.asarray(token) < vocabulary).all()
    np.testing.assert_allclose(entropy, np.log(vocabulary), atol=1e-6)


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)])
def test_vocabulary_of_qwen_against_float64(implementation, dtype, tolerance):
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(3, 32)) * 0.4, dtype)
    head = jnp.array(rng.normal(size=(151_936, 32)), dtype)
    token, log_prob, entropy = sample_with_entropy(
        hidden, head, jax.random.key(0), temperature=0.8, top_k=0, top_p=0.99, implementation=implementation
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 0.8
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    np.testing.assert_allclose(log_prob, log_p[np.arange(3), token], rtol=tolerance)
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(1), rtol=tolerance)


def test_one_key_gives_rows_of_their_own_and_bad_implementations_are_named():
    hidden, head = identity_case(np.zeros((64, 500)))
    token, _, _ = sample_with_entropy(hidden, head, jax.random.key(0), temperature=1.0, top_k=0, top_p=1.0)
    assert len(np.unique(token)) > 40
    with pytest.raises(ValueError, match="implementation='cuda'"):
        sample_with_entropy(hidden, head, jax.random.key(0), temperature=1.0, top_k=0, top_p=1.0, implementation="cuda")


@pytest.mark.parametrize("size", [4, 128, 300, 1000])  # in 1, 1, 3 and 8 tiles
def test_the_largest_in_tiles_are_the_largest_and_the_first_of_equals(size):
    rng = np.random.default_rng(size)
    values = rng.integers(0, 9, (64, size)).astype(np.float32)  # many equals
    values[rng.random(values.shape) < 0.5] = -np.inf
    values[0] = -np.inf
    in_tiles, sorted_ = (jax.vmap(partial(f, places=4))(jnp.asarray(values)) for f in (_largest_in_tiles, _largest))
    np.testing.assert_array_equal(in_tiles, sorted_)
