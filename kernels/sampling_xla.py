"""The plain-XLA twin of the sampling kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels.logits import token_logits
from kernels.noise import gumbel, threefry

CANDIDATES = 4


class Candidates(NamedTuple):
    """The tokens of a row with the largest perturbed logits, best first, and the row's statistics."""

    token: Int[Array, "B 4"]
    logit: Float[Array, "B 4"]  # at the row's temperature; at most `floor` where fewer than 4 tokens are above it
    mass_above: Float[Array, "B 4"]  # probability of all tokens that are strictly more likely
    count_above: Int[Array, "B 4"]  # their number
    log_normalizer: Float[Array, "B"]
    entropy: Float[Array, "B"]


def candidates(
    hidden: Float[Array, "B D"],
    lm_head: Float[Array, "V D"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    noise: Float[Array, "B"],
    banned: Bool[Array, "V"] | None,
    floor: Float[Array, "B"],
    attempt: Int[Array, ""],
    *,
    truncated: bool,
) -> Candidates:
    """Returns the candidates of every row among the tokens whose logit exceeds the row's `floor`.

    `noise` is 1 to sample and 0 to take the most likely. Normaliser, entropy, mass and count are of all tokens.
    Without `truncated` all candidates are the first one, and nothing is above them.
    """
    logits = token_logits(hidden, lm_head, temperature[:, None], banned)
    top = jnp.max(logits, axis=1, keepdims=True)
    shifted = logits - top
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=1)
    moment = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=1)  # a banned token has -inf * 0
    ids = jnp.arange(logits.shape[1], dtype=jnp.uint32)[None]
    bits = threefry(words[:, :1], words[:, 1:], ids, jnp.broadcast_to(attempt.astype(jnp.uint32), ids.shape))
    perturbed = jnp.where(logits > floor[:, None], logits + noise[:, None] * gumbel(bits), -jnp.inf)
    if truncated:
        token = jax.lax.platform_dependent(perturbed, tpu=_largest_without_sorting, default=_largest)
    else:
        token = jnp.broadcast_to(jnp.argmax(perturbed, axis=1)[:, None], (len(logits), CANDIDATES))
    logit = jnp.take_along_axis(logits, token, axis=1)
    if truncated:
        above = logits[:, None, :] > logit[:, :, None]
        mass = jnp.sum(jnp.where(above, weights[:, None, :], 0.0), axis=2) / total[:, None]
        count = jnp.sum(above, axis=2, dtype=jnp.int32)
    else:
        mass, count = jnp.zeros_like(logit), jnp.zeros_like(token)
    log_total = jnp.log(total)
    return Candidates(
        token.astype(jnp.int32), logit, mass, count.astype(jnp.int32), top[:, 0] + log_total, log_total - moment / total
    )


def _largest(values: Float[Array, "B V"]) -> Int[Array, "B 4"]:
    return jax.lax.top_k(values, min(CANDIDATES, values.shape[1]))[1]


def _largest_without_sorting(values: Float[Array, "B V"]) -> Int[Array, "B 4"]:
    # For TPUs top_k is a sort of the whole vocabulary, which takes the compiler two minutes.
    ids = jnp.arange(values.shape[1], dtype=jnp.int32)
    picked = []
    for _ in range(min(CANDIDATES, values.shape[1])):
        picked.append(jnp.argmax(values, axis=1).astype(jnp.int32)[:, None])
        values = jnp.where(ids == picked[-1], -jnp.inf, values)
    return jnp.concatenate(picked, axis=1)
