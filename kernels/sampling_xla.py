"""The plain-XLA twin of the sampling kernels, and what each of them returns."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels.logits import raw_logits, scale_and_mask
from kernels.noise import gumbel, threefry
from kernels.rows import each_row

CANDIDATES = 4
LOWEST = -3.0e38  # stands for -inf where -inf - -inf would be NaN


class Partial(NamedTuple):
    """One look at the vocabulary, or at a device's share of it: the largest perturbed logits, best first, and sums."""

    token: Int[Array, "B 4"]
    logit: Float[Array, "B 4"]  # at the row's temperature; at most `floor` where fewer than 4 tokens are above it
    perturbed: Float[Array, "B 4"]
    top: Float[Array, "B"]  # m, the largest logit
    total: Float[Array, "B"]  # l, the sum of exp(z - m)
    moment: Float[Array, "B"]  # s, the sum of (z - m) exp(z - m)


# (thresholds [B, C], m [B]) -> sum of exp(z - m) and number [B, C] of the logits z above each threshold
Above = Callable[[Float[Array, "B C"], Float[Array, "B"]], tuple[Float[Array, "B C"], Int[Array, "B C"]]]

TILE = 128  # tokens whose maximum is taken first
AT_ONCE = 1  # thresholds that `above` had best be asked about together: the first is nearly always enough


def look(
    hidden: Float[Array, "B D"],
    lm_head: Float[Array, "V D"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    noise: Float[Array, "B"],
    banned: Bool[Array, "V"] | None,
    floor: Float[Array, "B"],
    attempt: Int[Array, ""],
    first_id: Int[Array, ""],
) -> tuple[Partial, Above]:
    """Returns the candidates among the tokens whose logit exceeds the row's `floor`, and a function for their ranks.

    `noise` is 1 to sample and 0 to take the most likely; `first_id` is the token that the head's first row stands for.
    The sums are over all tokens.
    """
    raw = raw_logits(hidden, lm_head)
    width = raw.shape[1]
    places = min(CANDIDATES, width)
    ids = first_id.astype(jnp.uint32) + jnp.arange(width, dtype=jnp.uint32)

    def look_at(row) -> Partial:
        raw, temperature, words, noise, floor = row
        logits = scale_and_mask(raw, temperature, banned)
        top = jnp.maximum(jnp.max(logits), LOWEST)
        shifted = logits - top
        weights = jnp.exp(shifted)
        moment = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0))  # a banned token has -inf * 0
        bits = threefry(words[0], words[1], ids, jnp.broadcast_to(attempt.astype(jnp.uint32), ids.shape))
        perturbed = jnp.where(logits > floor, logits + noise * gumbel(bits), -jnp.inf)
        token = jax.lax.platform_dependent(
            perturbed,
            tpu=partial(_largest_without_sorting, places=places),
            cpu=partial(_largest_in_tiles, places=places),
            default=partial(_largest, places=places),
        )
        token = jnp.pad(token, (0, CANDIDATES - places), mode="edge")
        return Partial(token + first_id, logits[token], perturbed[token], top, jnp.sum(weights), moment)

    def rank(row) -> tuple[Float[Array, "C"], Int[Array, "C"]]:
        raw, temperature, thresholds, over = row
        logits = scale_and_mask(raw, temperature, banned)
        greater = logits > thresholds[:, None]
        mass = jnp.sum(jnp.where(greater, jnp.exp(logits - over), 0.0), axis=1)
        return mass, jnp.sum(greater, axis=1, dtype=jnp.int32)

    def above(thresholds, over):
        return each_row(rank, (raw, temperature, thresholds, over))

    return each_row(look_at, (raw, temperature, words, noise, floor)), above


def _largest(values: Float[Array, "V"], places: int) -> Int[Array, "C"]:
    return jax.lax.top_k(values, places)[1]


def _largest_in_tiles(values: Float[Array, "V"], places: int) -> Int[Array, "C"]:
    # On CPUs top_k is one thread that takes eight times as long as maxima, and the largest values lie in the tiles with
    # the largest maxima. The barrier: fused with the noise it looks at, a maximum becomes a loop that is not vectorised.
    padded = jnp.pad(values, (0, -len(values) % TILE), constant_values=-jnp.inf)
    tiles = jax.lax.optimization_barrier(padded).reshape(-1, TILE)
    maxima = tiles.max(axis=1)
    best = jnp.sort(_largest(maxima, min(places, len(maxima))))  # in order: the first of equals stays first
    ids = (best[:, None] * TILE + jnp.arange(TILE, dtype=jnp.int32)).reshape(-1)
    return ids[_largest(tiles[best].reshape(-1), places)]


def _largest_without_sorting(values: Float[Array, "V"], places: int) -> Int[Array, "C"]:
    # For TPUs top_k is a sort of the whole vocabulary, which takes the compiler two minutes.
    ids = jnp.arange(len(values), dtype=jnp.int32)
    picked = []
    for _ in range(places):
        picked.append(jnp.argmax(values).astype(jnp.int32))
        values = jnp.where(ids == picked[-1], -jnp.inf, values)
    return jnp.stack(picked)
