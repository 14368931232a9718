"""Hidden states x LM head -> token, its log-probability and the exact entropy of the whole distribution.

Sampling is by Gumbel noise, top-p and top-k without sorting: the tokens with the largest perturbed logits are drawn
without replacement from the full distribution, so the first of them that lies inside the truncated set is an exact
sample of the truncated distribution. Four candidates almost always hold one. A row whose four are all outside draws
again, with new noise, among the tokens more likely than the likeliest of the four. That too is exact: the truncated set
holds the most likely tokens, so none of it is lost, and the winner inside it is independent of its perturbed value.
The most likely token is always inside, so draws end; their number grows with log V, whatever top-k and top-p are.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kernels import sampling_gpu, sampling_tpu, sampling_xla
from kernels.implementations import chosen
from kernels.sampling_xla import CANDIDATES, LOWEST, Above, Partial


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
    axis_name: str | None = None,
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
        keeps the most likely only, 1 keeps all. Tokens as likely as the last one kept are kept too. With both, a token must
        be kept by each: the probabilities are those of the full distribution, not of the top k.
      banned: tokens that are never drawn and are outside the normaliser.
      implementation: "tpu", "gpu" (Pallas; one device, so inside shard_map if there are more), "xla", "tpu_interpret",
        "gpu_interpret" (the Pallas kernels in the interpreter, for tests), or None: "xla", until a Pallas kernel has been
        timed on its device and won.
      axis_name: inside shard_map, the mesh axis over which the vocabulary is split in equal parts, in order; `lm_head` and
        `banned` are this device's part. All devices return what one device with the whole vocabulary draws.

    `log_prob` and `entropy` are those of the full, untruncated distribution at `temperature`: what a learner recomputes.
    A row without a distribution (logits that are not finite, or every token banned) gets NaN for both.
    """
    name, interpret = chosen(implementation)
    rows = hidden.shape[0]
    full = isinstance(top_k, int) and top_k == 0 and isinstance(top_p, (int, float)) and top_p >= 1
    temperature, top_p = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows,)) for x in (temperature, top_p))
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), (rows,))
    top_k = jnp.where(top_k <= 0, jnp.int32(2**30), top_k)
    words = jax.random.key_data(rng).astype(jnp.uint32)
    if words.ndim == 1:  # one key: each row takes its own stream of it
        words = jax.random.key_data(jax.random.split(rng, rows)).astype(jnp.uint32)
    scale = jnp.where(temperature > 0, temperature, 1.0)
    noise = (temperature > 0).astype(jnp.float32)
    first_id, vocabulary = jnp.int32(0), lm_head.shape[0]
    if axis_name:
        first_id = (jax.lax.axis_index(axis_name) * vocabulary).astype(jnp.int32)
    arguments = (hidden, lm_head, words[:, -2:], scale, noise, banned)
    module: ModuleType = {"tpu": sampling_tpu, "gpu": sampling_gpu, "xla": sampling_xla}[name]
    look = functools.partial(module.look, interpret=True) if interpret else module.look

    def draw(state: _Draw) -> _Draw:
        found, above = look(*arguments, state.floor, state.attempt, first_id)
        if axis_name:
            found = _merge(found, axis_name)
        log_total = jnp.log(found.total)
        entropy = log_total - found.moment / found.total
        kept = found.logit > state.floor[:, None]
        if not full:
            kept &= _inside(found, above, top_p, top_k, module.AT_ONCE, axis_name)
        first = jnp.argmax(kept, axis=1)[:, None]
        token = jnp.take_along_axis(found.token, first, axis=1)[:, 0]
        # The largest logit is taken off first: their difference is exact, where a sum of 1e4 and 1 is rounded to 1e-3.
        log_prob = jnp.take_along_axis(found.logit, first, axis=1)[:, 0] - found.top - log_total
        defined = jnp.isfinite(found.top + log_total)  # else no draw would ever be inside
        here = state.pending & (kept.any(axis=1) | ~defined)
        return _Draw(
            state.attempt + 1,
            jnp.maximum(state.floor, found.logit.max(axis=1)),
            state.pending & ~here,
            jnp.where(here, token, state.token),
            jnp.where(here, jnp.where(defined, log_prob, jnp.nan), state.log_prob),
            # Drawing again is compiled apart and may round otherwise: a row's entropy must not depend on its neighbours.
            jnp.where(state.attempt > 0, state.entropy, jnp.where(defined, entropy, jnp.nan)),
        )

    zeros, lowest = jnp.zeros(rows, jnp.float32), jnp.full(rows, LOWEST, jnp.float32)
    first = draw(_Draw(jnp.int32(0), lowest, jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32), zeros, zeros))
    end = first if full else jax.lax.while_loop(lambda s: s.pending.any(), draw, first)
    return end.token, end.log_prob, end.entropy


def _merge(found: Partial, axis_name: str) -> Partial:
    """Returns the look at the whole vocabulary: a few numbers a row cross the devices, never logits."""
    top = jax.lax.pmax(found.top, axis_name)
    shift = found.top - top
    scale = jnp.exp(shift)
    total = jax.lax.psum(scale * found.total, axis_name)
    moment = jax.lax.psum(scale * (found.moment + jnp.where(found.total > 0, shift * found.total, 0.0)), axis_name)
    token, logit, perturbed = (
        jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (found.token, found.logit, found.perturbed)
    )
    best = jax.lax.top_k(perturbed, CANDIDATES)[1]  # of equals the first: the lowest id, as on one device
    token, logit, perturbed = (jnp.take_along_axis(x, best, axis=1) for x in (token, logit, perturbed))
    return Partial(token, logit, perturbed, top, total, moment)


def _inside(
    found: Partial, above: Above, top_p: Float[Array, "B"], top_k: Int[Array, "B"], at_once: int, axis_name: str | None
) -> Bool[Array, "B 4"]:
    """Returns which candidates lie inside their row's truncated set, up to the first place at which every row has one."""
    untruncated = (top_p >= 1) & (top_k >= 2**30)

    def step(state):
        place, inside = state
        mass, count = above(jax.lax.dynamic_slice_in_dim(found.logit, place, at_once, axis=1), found.top)
        if axis_name:
            mass, count = jax.lax.psum((mass, count), axis_name)
        in_top_p = (mass / found.total[:, None] < top_p[:, None]) | (count == 0) | (top_p >= 1)[:, None]
        fits = in_top_p & (count < top_k[:, None])
        return place + at_once, inside | jax.lax.dynamic_update_slice(jnp.zeros_like(inside), fits, (0, place))

    def going(state):
        return (state[0] < CANDIDATES) & ~state[1].any(axis=1).all()

    start = jnp.broadcast_to(untruncated[:, None], found.logit.shape)
    return jax.lax.while_loop(going, step, (jnp.int32(0), start))[1]
