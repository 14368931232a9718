"""The surrogate: micro-batches add up, what is masked never leaks, and the clipping is counted where it happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.aepo.loss import clipped_surrogate, importance_weights, reduction_weights, surrogate_terms
from tests.aepo import oracle

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["token", "seq"]))
def test_micro_batches_of_any_split_add_up(seed, reduction):
    """The weights come from the whole update; parts of any size then sum to its loss and gradient."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        log_p, old, advantages = rng.normal(-2, 1, (3, 8, 5))
        mask = rng.random((8, 5)) < 0.6
        weights = np.asarray(reduction_weights(mask, reduction))

        def part(x, i, j):
            terms, _ = surrogate_terms(x, old[i:j], advantages[i:j], **CLIP)
            return jnp.sum(weights[i:j] * terms)

        cuts = [0, *sorted(rng.integers(0, 9, 2).tolist()), 8]
        parts = [jax.value_and_grad(part)(jnp.asarray(log_p[i:j]), i, j) for i, j in zip(cuts, cuts[1:], strict=False)]
        value, gradient = jax.value_and_grad(
            lambda x: clipped_surrogate(x, old, advantages, mask, **CLIP, reduction=reduction)[0]
        )(jnp.asarray(log_p))
        np.testing.assert_allclose(sum(float(v) for v, _ in parts), value, atol=1e-9)
        np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, atol=1e-9)
        np.testing.assert_allclose(value, oracle.loss(log_p, old, advantages, mask, 0.2, 0.3, 3.0, reduction), atol=1e-6)


@pytest.mark.parametrize("kind", [bool, int, float])
def test_nothing_leaks_from_outside_the_mask(kind):
    mask = np.array([[1, 1, 0, 0, 0]]).astype(kind)
    log_p = jnp.array([[-1.0, -2.0, -jnp.inf, jnp.nan, 80.0]])
    old = jnp.array([[-1.0, -2.5, 0.0, 0.0, jnp.nan]])
    advantages = jnp.array([[1.0, -1.0, jnp.nan, 1.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda x: clipped_surrogate(x, old, advantages, mask, **CLIP, reduction="seq")[0])(
        log_p
    )
    np.testing.assert_allclose(value, (-1 + np.exp(0.5)) / 2, atol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, np.exp(0.5) / 2, 0, 0, 0]], atol=1e-6)


def test_clipping_by_hand():
    """Ratio 2, 2, 1/2, 1/2, 4 with advantages +, -, +, -, -: clipped high; free; free; clipped low; dual at 3."""
    ratios = np.array([[2.0, 2.0, 0.5, 0.5, 4.0]])
    advantages = np.array([[1.0, -1.0, 1.0, -1.0, -1.0]])
    terms, where = surrogate_terms(np.log(ratios), np.zeros((1, 5)), advantages, **CLIP)
    np.testing.assert_allclose(terms, [[-1.3, 2.0, -0.5, 0.8, 3.0]], atol=1e-6)
    flags = {name: np.flatnonzero(value).tolist() for name, value in where.items()}
    assert flags == {"high": [0], "low": [3], "dual": [4]}
    metrics = clipped_surrogate(np.log(ratios), 0 * ratios, advantages, ratios > 0, **CLIP, reduction="token")[1]
    np.testing.assert_allclose([metrics[f"clip_{name}"] for name in ("high", "low", "dual")], 0.2)


def test_an_empty_batch_costs_nothing():
    zero = np.zeros((2, 3))
    for reduction in ("token", "seq"):
        assert float(clipped_surrogate(zero, zero, zero, zero > 0, **CLIP, reduction=reduction)[0]) == 0
    with pytest.raises(ValueError, match="reduction='mean'"):
        reduction_weights(zero > 0, "mean")


def test_importance_weights_are_truncated_and_take_no_gradient():
    recomputed, sampled = jnp.log(jnp.array([0.5, 0.5, 0.9])), jnp.log(jnp.array([0.5, 0.1, 1.0]))
    np.testing.assert_allclose(importance_weights(recomputed, sampled, 2.0), [1, 2, 0.9], atol=1e-6)
    gradient = jax.grad(lambda x: importance_weights(x, sampled, 2.0).sum())(recomputed)
    np.testing.assert_array_equal(gradient, 0)
