import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import token_log_probs_and_entropy


def naive(hidden, head, targets, temperature, banned):
    logits = jnp.where(banned, -jnp.inf, hidden @ head.T / temperature)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(banned, 0.0, p * jnp.where(banned, 0.0, log_p)), axis=1)
    return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], entropy


@pytest.mark.parametrize("count", [1, 50, 130])
def test_values_and_gradients_equal_the_naive_ones(count):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((count, 16), (33, 16)))
    targets = jnp.asarray(rng.integers(2, 33, count))
    banned = jnp.arange(33) < 2
    weights = jnp.asarray(rng.normal(size=(2, count)), jnp.float32)

    def loss(function):
        def value(hidden, head):
            log_prob, entropy = function(hidden, head)
            return jnp.sum(weights[0] * log_prob + weights[1] * entropy)

        return jax.value_and_grad(value, argnums=(0, 1))(hidden, head)

    mine = loss(lambda h, w: token_log_probs_and_entropy(h, w, targets, temperature=0.8, banned=banned, chunk=64))
    other = loss(lambda h, w: naive(h, w, targets, 0.8, banned))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_memory_does_not_grow_with_the_logits():
    count, vocabulary, width = 16_384, 32_768, 8

    def loss(hidden, head, targets):
        return sum(x.sum() for x in token_log_probs_and_entropy(hidden, head, targets, temperature=1.0))

    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((count, width), jnp.float32), ((vocabulary, width), jnp.float32), ((count,), jnp.int32))
    ]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < count * vocabulary * 4 / 2


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="temperature=0"):
        token_log_probs_and_entropy(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.array([0]), temperature=0)
