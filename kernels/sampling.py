"""Hidden states x LM head -> token, its log-probability and the exact entropy of the whole distribution.

Sampling is by Gumbel noise, top-p and top-k without sorting: the tokens with the largest perturbed logits are drawn
without replacement from the full distribution, so the first of them that lies inside the truncated set is an exact
sample of the truncated distribution. Four candidates almost always hold one; a row whose four are all outside is drawn
again with new noise (the winner inside the set is independent of its perturbed value, so this too is exact).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kernels import sampling_tpu, sampling_xla

IMPLEMENTATIONS = ("tpu", "gpu", "xla", "tpu_interpret")


class _Draw(NamedTuple):
    attempt: Int[Array, ""]
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
      temperature: divides the logits; 0 takes the most likely token (its statistics are then those at temperature 1).
      top_k: keep the k most likely tokens; 0 keeps all. Tokens as likely as the k-th are kept too.
      top_p: keep the most likely tokens until their probability reaches top_p (the token that crosses it included).
      banned: tokens that are never drawn and are outside the normaliser.
      implementation: "tpu" (Pallas), "xla", "gpu" (compiled by XLA too), "tpu_interpret" (the Pallas kernel in the
        interpreter, for tests), or None: Pallas when lowered for a TPU, XLA elsewhere.

    `log_prob` and `entropy` are those of the full, untruncated distribution at `temperature`: what a learner recomputes.
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

    def candidates(attempt):
        def xla(*a):
            return sampling_xla.candidates(*a, attempt, truncated=not full)

        def tpu(*a, interpret=False):
            return sampling_tpu.candidates(*a, attempt, truncated=not full, interpret=interpret)

        if implementation in ("xla", "gpu"):
            return xla(*arguments)
        if implementation == "tpu_interpret":
            return tpu(*arguments, interpret=True)
        if implementation == "tpu":
            return tpu(*arguments)
        return jax.lax.platform_dependent(*arguments, tpu=tpu, default=xla)

    def draw(state: _Draw) -> _Draw:
        found = candidates(state.attempt)
        inside = (found.mass_above < top_p[:, None]) & (found.count_above < top_k[:, None])
        first = jnp.argmax(inside, axis=1)[:, None]
        token = jnp.take_along_axis(found.token, first, axis=1)[:, 0]
        log_prob = jnp.take_along_axis(found.logit, first, axis=1)[:, 0] - found.log_normalizer
        here = state.pending & inside.any(axis=1)
        return _Draw(
            state.attempt + 1,
            state.pending & ~here,
            jnp.where(here, token, state.token),
            jnp.where(here, log_prob, state.log_prob),
            found.entropy,
        )

    zeros = jnp.zeros(rows, jnp.float32)
    start = _Draw(jnp.int32(0), jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32), zeros, zeros)
    first = draw(start)
    end = first if full else jax.lax.while_loop(lambda s: s.pending.any(), draw, first)
    return end.token, end.log_prob, end.entropy
