"""Attention with all scores of a row at once: [T, S] exists while it is computed, and is not kept for the backward pass.

Forwards a softmax, backwards from its log-sum-exp (FlashAttention-2, arXiv 2307.08691, with one tile). Left to autodiff, two
arrays [T, S] of each layer are kept, and moved about more often than they are computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

_LOWEST = -1e30  # stands for -inf, which a row that sees nothing would turn into NaN
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: query head n reads key/value head n // (N / K). A row that sees nothing gives a mean."""
    rows, length, heads, size = query.shape
    kv_heads = key.shape[2]
    # The queries of a key/value head are one axis, tokens outside: one product a head, and tokens may be split over devices.
    grouped = query.reshape(rows, length, kv_heads, -1, size).swapaxes(1, 2).reshape(rows, kv_heads, -1, size)
    mixed = _attend(grouped, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)
    return mixed.reshape(rows, kv_heads, length, -1, size).swapaxes(1, 2).reshape(rows, length, heads, size)


@jax.custom_vjp
def _attend(query, key, value, mask):
    return _forward(query, key, value, mask)[0]


def _scores(query: Float[Array, "B K Q H"], key: Float[Array, "B K S H"]) -> Float[Array, "B K Q S"]:
    return _einsum("BKQH,BKSH->BKQS", query, key) * query.shape[-1] ** -0.5


def _where(mask: Bool[Array, "B T S"], x: Float[Array, "B K Q S"], otherwise: float) -> Float[Array, "B K Q S"]:
    by_token = x.reshape(*x.shape[:2], mask.shape[1], -1, x.shape[3])
    return jnp.where(mask[:, None, :, None], by_token, otherwise).reshape(x.shape)


def _forward(query, key, value, mask):
    scores = _where(mask, _scores(query, key), _LOWEST)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = _einsum("BKQS,BKSH->BKQH", weights.astype(value.dtype), value) / total
    # Named, so that a remat policy can keep them instead of the scores' being made three times.
    out, log_total = (checkpoint_name(x, "attention") for x in (mixed.astype(query.dtype), top + jnp.log(total)))
    return out, (query, key, value, mask, out, log_total)


def _backward(residuals, gradient):
    query, key, value, mask, out, log_total = residuals
    weights = _where(mask, jnp.exp(_scores(query, key) - log_total), 0.0)
    # The softmax's own term, sum of p dp over the keys, is the product of output and gradient.
    own = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = _einsum("BKQH,BKSH->BKQS", gradient, value)
    d_scores = (weights * (d_weights - own) * query.shape[-1] ** -0.5).astype(query.dtype)
    d_query = _einsum("BKQS,BKSH->BKQH", d_scores, key)
    d_key = _einsum("BKQS,BKQH->BKSH", d_scores, query)
    d_value = _einsum("BKQS,BKQH->BKSH", weights.astype(gradient.dtype), gradient)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
