"""Self-attention over long rows, a tile of queries and keys at a time: neither a mask nor scores of [T, T] ever exist.

Forwards with an online softmax, backwards from its log-sum-exp (FlashAttention-2, arXiv 2307.08691). What a tile may see is
decided from a few numbers a token, and tiles in which nobody sees anybody are not computed: other segments, the future,
other branches of a tree, other windows of an image, padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512  # tokens a side of a tile
_LOWEST = -1e30  # stands for -inf where -inf - -inf would be NaN


def blockwise_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_marks: Int[Array, "B 4 T"],
    key_marks: Int[Array, "B 4 S"],
    *,
    causal: bool,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, differentiable in query, key and value. Padding (group 0) gives 0.

    Marks: place in the row, group, first and last leaf below the token; `attention_mask` says who sees whom.
    """
    rows, length, heads, size = query.shape
    kv_heads = key.shape[2]

    def cut(x):  # [B, T, N, H] -> [B, n, N, b, H]
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        return x.reshape(rows, -1, block, x.shape[2], size).swapaxes(2, 3)

    def cut_marks(x):  # [B, 4, T] -> [B, n, 4, b]
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block))).reshape(rows, 4, -1, block).swapaxes(1, 2)

    grouped = cut(query)
    tiles = grouped.shape[1]
    grouped = grouped.reshape(rows, tiles, kv_heads, heads // kv_heads, block, size)
    mixed = _attend(grouped, cut(key), cut(value), cut_marks(query_marks), cut_marks(key_marks), causal)
    return mixed.reshape(rows, tiles, heads, block, size).swapaxes(2, 3).reshape(rows, -1, heads, size)[:, :length]


def attention_mask(query: Int[Array, "4 T"], key: Int[Array, "4 S"], causal: bool) -> Bool[Array, "T S"]:
    """Returns what `attention.causal_mask` and `attention.same_group_mask` say, from marks."""
    (place, group, first, last), (key_place, key_group, key_first, key_last) = query[:, :, None], key[:, None, :]
    seen = (group == key_group) & (key_first <= first) & (last <= key_last)
    return seen & (key_place <= place) if causal else seen


class _Tiles(NamedTuple):
    needed: Bool[Array, "n m"]  # of query block i and key block j: may anyone see anyone?
    first: Int[Array, "n"]  # key blocks of a query block: from here
    end: Int[Array, "n"]  # to here


def _tiles(query: Int[Array, "n 4 b"], key: Int[Array, "m 4 b"], causal: bool) -> _Tiles:
    """From the smallest and the largest of each mark in a block: necessary for a visible pair, not sufficient."""

    def bounds(marks):
        there = marks[:, 1:2] > 0
        low = jnp.min(jnp.where(there, marks, jnp.iinfo(jnp.int32).max), axis=2)
        return low, jnp.max(jnp.where(there, marks, -1), axis=2)

    (low, high), (key_low, key_high) = bounds(query), bounds(key)
    low, high, key_low, key_high = low[:, None], high[:, None], key_low[None], key_high[None]
    place, group, first, last = range(4)
    needed = (high[..., group] >= key_low[..., group]) & (low[..., group] <= key_high[..., group])
    needed &= (high[..., first] >= key_low[..., first]) & (low[..., last] <= key_high[..., last])
    if causal:
        needed &= high[..., place] >= key_low[..., place]
    end = jnp.where(needed.any(axis=1), len(key) - jnp.argmax(needed[:, ::-1], axis=1), 0)
    return _Tiles(needed, jnp.argmax(needed, axis=1), end)


def _visible(query: Int[Array, "4 b"], key: Int[Array, "4 b"], causal: bool) -> Bool[Array, "b b"]:
    return attention_mask(query, key, causal) & (query[1, :, None] > 0)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, query_marks, key_marks, causal):
    return _forward(query, key, value, query_marks, key_marks, causal)[0]


def _forward(query, key, value, query_marks, key_marks, causal):
    scale = query.shape[-1] ** -0.5

    def row(operands):
        query, key, value, query_marks, key_marks = operands
        tiles = _tiles(query_marks, key_marks, causal)

        def block(i):
            q = query[i]

            def tile(j, carry):
                def computed(carry):
                    top, total, mixed = carry
                    visible = _visible(query_marks[i], key_marks[j], causal)
                    scores = jnp.where(visible, _einsum("kgqh,ksh->kgqs", q, key[j]) * scale, _LOWEST)
                    new = jnp.maximum(top, scores.max(-1))
                    weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
                    decay = jnp.exp(top - new)
                    part = _einsum("kgqs,ksh->kgqh", weights.astype(value.dtype), value[j])
                    return new, total * decay + weights.sum(-1), mixed * decay[..., None] + part

                return jax.lax.cond(tiles.needed[i, j], computed, lambda carry: carry, carry)

            start = jnp.full(q.shape[:-1], _LOWEST), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32)
            top, total, mixed = jax.lax.fori_loop(tiles.first[i], tiles.end[i], tile, start)
            seen = jnp.where(total > 0, total, 1.0)
            return (mixed / seen[..., None]).astype(query.dtype), top + jnp.log(seen)

        return jax.lax.map(block, jnp.arange(len(query)))

    out, log_total = jax.lax.map(row, (query, key, value, query_marks, key_marks))
    # Named, so that a remat policy can keep them: the loops above are the dearest thing to do again.
    out, log_total = checkpoint_name(out, "attention"), checkpoint_name(log_total, "attention")
    return out, (query, key, value, query_marks, key_marks, out, log_total)


def _backward(causal, residuals, gradient):
    scale = residuals[0].shape[-1] ** -0.5

    def row(operands):
        query, key, value, query_marks, key_marks, out, log_total, gradient = operands
        tiles = _tiles(query_marks, key_marks, causal)
        # The softmax's own term, sum of p dp over the keys, is the product of output and gradient.
        own = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)

        def block(carry, i):
            q, g = query[i], gradient[i]

            def tile(j, carry):
                def computed():
                    k, v = key[j], value[j]
                    scores = _einsum("kgqh,ksh->kgqs", q, k) * scale - log_total[i][..., None]
                    weights = jnp.where(_visible(query_marks[i], key_marks[j], causal), jnp.exp(scores), 0.0)
                    d_weights = _einsum("kgqh,ksh->kgqs", g, v)
                    d_scores = (weights * (d_weights - own[i][..., None]) * scale).astype(q.dtype)
                    d_value = _einsum("kgqs,kgqh->ksh", weights.astype(g.dtype), g)
                    return _einsum("kgqs,ksh->kgqh", d_scores, k), _einsum("kgqs,kgqh->ksh", d_scores, q), d_value

                def nothing():
                    return jnp.zeros(q.shape, jnp.float32), *(jnp.zeros(key.shape[1:], jnp.float32) for _ in range(2))

                # The sums stay outside: carried through the condition they would be copied at every tile.
                d_query, d_key, d_value = carry
                parts = jax.lax.cond(tiles.needed[i, j], computed, nothing)
                return d_query + parts[0], d_key.at[j].add(parts[1]), d_value.at[j].add(parts[2])

            start = jnp.zeros(q.shape, jnp.float32), *carry
            d_query, *carry = jax.lax.fori_loop(tiles.first[i], tiles.end[i], tile, start)
            return tuple(carry), d_query.astype(query.dtype)

        zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
        (d_key, d_value), d_query = jax.lax.scan(block, zeros, jnp.arange(len(query)))
        return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)

    return *jax.lax.map(row, (*residuals, gradient)), None, None


_attend.defvjp(_forward, _backward)
