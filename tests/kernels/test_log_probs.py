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


def exact(hidden, head, targets, temperature):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return log_p[np.arange(len(targets)), targets], -np.sum(np.exp(log_p) * log_p, axis=1)


@pytest.mark.parametrize(
    ("count", "vocabulary", "dtype"), [(37, 97, jnp.float32), (37, 96, jnp.bfloat16), (5, 151_936, jnp.float32)]
)
def test_values_against_float64(count, vocabulary, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = (0.4 * jax.random.normal(keys[0], (count, 24))).astype(dtype)
    head = jax.random.normal(keys[1], (vocabulary, 24)).astype(dtype)
    targets = jax.random.randint(keys[2], (count,), 0, vocabulary)
    got = token_log_probs_and_entropy(hidden, head, targets, temperature=0.7, chunk=16)
    for value, expected in zip(got, exact(hidden, head, targets, 0.7), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-6)


def test_extreme_logits_have_values_and_gradients():
    """Rows of given logits, by a hidden state that is the identity: +-1e4, all equal, one-hot."""
    rows = np.stack([np.where(np.arange(33) % 2, 1e4, -1e4), np.zeros(33), np.full(33, 1e4), 1e4 * np.eye(33)[4]])
    targets = np.array([1, 3, 32, 4])

    def both(hidden, head):
        return token_log_probs_and_entropy(hidden, head, jnp.array(targets), temperature=1.0)

    hidden, head = jnp.eye(4), jnp.array(rows.T, jnp.float32)
    for value, expected in zip(both(hidden, head), exact(np.eye(4), rows.T, targets, 1.0), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for gradient in jax.grad(lambda h, w: sum(x.sum() for x in both(h, w)), argnums=(0, 1))(hidden, head):
        assert jnp.isfinite(gradient).all()


def test_a_banned_target_takes_no_gradient():
    banned = jnp.arange(9) == 7

    def log_prob(hidden):
        return token_log_probs_and_entropy(hidden, jnp.eye(9), jnp.array([7]), temperature=1.0, banned=banned)[0][0]

    assert log_prob(jnp.ones((1, 9))) == -jnp.inf
    assert not jax.grad(log_prob)(jnp.ones((1, 9))).any()
