"""Hidden states x LM head -> token, its log-probability and the exact entropy of the whole distribution.

Sampling is by Gumbel noise, top-p and top-k without sorting: the tokens with the largest perturbed logits are drawn
without replacement from the full distribution, so the first of them that lies inside the truncated set is an exact
sample of the truncated distribution. Four candidates almost always hold one. A row whose four are all outside draws
again, with new noise, among the tokens more likely than the likeliest of the four. That too is exact: the truncated set
holds the most likely tokens, so none of it is lost, and the winner inside it is independent of its perturbed value.
The most likely token is always inside, so draws end; their number grows with log V, whatever top-k and top-p are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kernels import sampling_tpu, sampling_xla
from kernels.sampling_tpu import LOWEST
from kernels.sampling_xla import Candidates

IMPLEMENTATIONS = ("tpu", "gpu", "xla", "tpu_interpret")


class _Draw(NamedTuple):
    attempt: Int[Array, ""]
    floor: Float[Array, "B"]  # tokens at or below are known to be outside the truncated set
    pending: Bool[Array, "B"]
    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    entropy: Float[Array, "B"]


def sample_with_entropy(
    hidden: Float[Array, "B D"],
    lm_head: Float[Array, "V D"],
    rng: Key[Array, ""] | Key[Array, "B"],
    *,
    temperature: float | Float[Array, "B"],
    top_k: int | Int[Array, "B"],
    top_p: float | Float[Array, "B"],
    banned: Bool[Array, "V"] | None = None,
    implementation: str | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Draws one token a row. Returns (token [B] int32, log_prob [B] float32, entropy [B] float32), in nats.

    Args:
      hidden: final hidden states.
      lm_head: output embedding.
      rng: one typed key, or one a row; the draw of a row depends on its own key alone.
      temperature: divides the logits; 0 takes the most likely token, the lowest id among equals, and gives the statistics
        at temperature 1.
      top_k: keep the k most likely tokens; 0 keeps all. Tokens as likely as the k-th are kept too.
      top_p: keep the most likely tokens until their probability reaches top_p, the token that crosses it included; 0
        keeps the most likely only, 1 keeps all. Tokens as likely as the last one kept are kept too.
      banned: tokens that are never drawn and are outside the normaliser.
      implementation: "tpu" (Pallas; one device, so inside shard_map if there are more), "xla", "gpu" (compiled by XLA
        too), "tpu_interpret" (the Pallas kernel in the interpreter, for tests), or None: "xla", until the Pallas kernel
        has been timed on a TPU and won.

    `log_prob` and `entropy` are those of the full, untruncated distribution at `temperature`: what a learner recomputes.
    A row without a distribution (logits that are not finite, or every token banned) gets NaN for both.
    """
    if implementation not in (*IMPLEMENTATIONS, None):
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}, None")
    rows = hidden.shape[0]
    full = isinstance(top_k, int) and top_k == 0 and isinstance(top_p, (int, float)) and top_p >= 1
    temperature, top_p = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows,)) for x in (temperature, top_p))
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), (rows,))
    top_k = jnp.where(top_k <= 0, lm_head.shape[0], top_k)
    words = jax.random.key_data(rng).astype(jnp.uint32)
    if words.ndim == 1:  # one key: each row takes its own stream of it
        words = jax.random.key_data(jax.random.split(rng, rows)).astype(jnp.uint32)
    scale = jnp.where(temperature > 0, temperature, 1.0)
    noise = (temperature > 0).astype(jnp.float32)
    arguments = (hidden, lm_head, words[:, -2:], scale, noise, banned)

    candidates: Callable[..., Candidates] = sampling_xla.candidates
    if implementation in ("tpu", "tpu_interpret"):
        candidates = functools.partial(sampling_tpu.candidates, interpret=implementation == "tpu_interpret")

    def draw(state: _Draw) -> _Draw:
        found = candidates(*arguments, state.floor, state.attempt, truncated=not full)
        in_top_p = (found.mass_above < top_p[:, None]) | (found.count_above == 0) | (top_p >= 1)[:, None]
        inside = (found.logit > state.floor[:, None]) & in_top_p & (found.count_above < top_k[:, None])
        first = jnp.argmax(inside, axis=1)[:, None]
        token = jnp.take_along_axis(found.token, first, axis=1)[:, 0]
        log_prob = jnp.take_along_axis(found.logit, first, axis=1)[:, 0] - found.log_normalizer
        defined = jnp.isfinite(found.log_normalizer)  # else no draw would ever be inside
        here = state.pending & (inside.any(axis=1) | ~defined)
        return _Draw(
            state.attempt + 1,
            jnp.maximum(state.floor, found.logit.max(axis=1)),
            state.pending & ~here,
            jnp.where(here, token, state.token),
            jnp.where(here, jnp.where(defined, log_prob, jnp.nan), state.log_prob),
            jnp.where(defined, found.entropy, jnp.nan),
        )

    zeros, lowest = jnp.zeros(rows, jnp.float32), jnp.full(rows, LOWEST, jnp.float32)
    first = draw(_Draw(jnp.int32(0), lowest, jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32), zeros, zeros))
    end = first if full else jax.lax.while_loop(lambda s: s.pending.any(), draw, first)
    return end.token, end.log_prob, end.entropy
