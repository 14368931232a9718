"""The learner's form: log-probability of given tokens and entropy of their distributions, without the logits.

Tokens go through in chunks, forwards and backwards; memory is chunk x V whatever N is. The backward pass is written by
hand: with p the softmax of z, dz = g_lp (1[target] - p) - g_H p (log p + H), then divided by the temperature.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 1024


def token_log_probs_and_entropy(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    *,
    temperature: float,
    banned: Bool[Array, "V"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Returns (log_prob [N], entropy [N]) in nats, float32, differentiable in `hidden` and `lm_head`.

    Args:
      hidden: hidden states that predict the targets.
      lm_head: output embedding.
      targets: the tokens. A banned target has log-probability -inf and takes no gradient.
      temperature: divides the logits.
      banned: tokens outside the distribution, as in `sample_with_entropy`.
      implementation: "tpu", "gpu", "xla" or None: all are compiled by XLA, whose matmuls do the work.
    """
    if implementation not in ("tpu", "gpu", "xla", None):
        raise ValueError(f"implementation={implementation!r} is not one of tpu, gpu, xla, None")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: a log-probability needs one above 0")
    count = hidden.shape[0]
    allowed = jnp.ones(lm_head.shape[0], bool) if banned is None else ~banned
    chunk = min(CHUNK, max(count, 1))
    padding = -count % chunk
    log_probs, entropy = _chunked(
        jnp.pad(hidden, ((0, padding), (0, 0))), lm_head, jnp.pad(targets, (0, padding)), allowed, temperature, chunk
    )
    return log_probs[:count], entropy[:count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, lm_head, targets, allowed, temperature, chunk):
    return _forward(hidden, lm_head, targets, allowed, temperature, chunk)[0]


def _logits(hidden, lm_head, allowed, temperature):
    logits = jnp.einsum("ND,VD->NV", hidden, lm_head, preferred_element_type=jnp.float32) / temperature
    return jnp.where(allowed, logits, -jnp.inf)


def _forward(hidden, lm_head, targets, allowed, temperature, chunk):
    def step(_, piece):
        h, target = piece
        logits = _logits(h, lm_head, allowed, temperature)
        top = jnp.max(logits, axis=1, keepdims=True)
        shifted = logits - top
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=1)
        log_total = jnp.log(total)
        moment = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=1)
        log_prob = jnp.take_along_axis(shifted, target[:, None], axis=1)[:, 0] - log_total
        return None, (log_prob, log_total - moment / total, top[:, 0] + log_total)

    pieces = hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)
    _, (log_prob, entropy, log_normalizer) = jax.lax.scan(step, None, pieces)
    log_prob, entropy, log_normalizer = (x.reshape(-1) for x in (log_prob, entropy, log_normalizer))
    return (log_prob, entropy), (hidden, lm_head, targets, allowed, log_normalizer, entropy)


def _backward(temperature, chunk, residuals, cotangents):
    hidden, lm_head, targets, allowed, log_normalizer, entropy = residuals
    g_log_prob, g_entropy = cotangents
    ids = jnp.arange(lm_head.shape[0])

    def step(d_head, piece):
        h, target, normalizer, entropy, g_lp, g_h = piece
        log_p = _logits(h, lm_head, allowed, temperature) - normalizer[:, None]
        p = jnp.exp(log_p)
        g_lp = jnp.where(allowed[target], g_lp, 0.0)
        surprise = jnp.where(p > 0, log_p, 0.0) + entropy[:, None]
        d_logits = g_lp[:, None] * ((ids == target[:, None]) - p) - g_h[:, None] * p * surprise
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        d_h = jnp.einsum("NV,VD->ND", d_logits, lm_head, preferred_element_type=jnp.float32)
        d_head = d_head + jnp.einsum("NV,ND->VD", d_logits, h, preferred_element_type=jnp.float32)
        return d_head, d_h.astype(hidden.dtype)

    pieces = jax.tree.map(
        lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden, targets, log_normalizer, entropy, g_log_prob, g_entropy)
    )
    d_head, d_hidden = jax.lax.scan(step, jnp.zeros(lm_head.shape, jnp.float32), pieces)
    return d_hidden.reshape(hidden.shape), d_head.astype(lm_head.dtype), None, None


_chunked.defvjp(_forward, _backward)
