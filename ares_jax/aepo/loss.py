"""The clipped surrogate with token-wise KL (method.md, section 3, "Objective")."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ares_jax.aepo.namespace import namespace

_LOG_RATIO_CLAMP = 20.0


def surrogate_terms(
    log_probs: Float[Array, "..."],
    old_log_probs: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Float[Array, "..."], dict[str, Bool[Array, "..."]]]:
    """Returns the loss of every token, and where it was clipped above, below, or by the dual clip.

    PPO's clipped surrogate with two bounds (arXiv 2503.14476) and a dual clip for negative advantages (arXiv 1912.09729).
    """
    ratio = jnp.exp(jnp.clip(log_probs - old_log_probs, -_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP))
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    worse = jnp.maximum(free, clipped)
    ceiling = -advantages * clip_dual
    dual = (advantages < 0) & (worse > ceiling)
    outside = clipped > free
    where = {"high": outside & (advantages > 0), "low": outside & (advantages < 0), "dual": dual}
    return jnp.where(dual, ceiling, worse), where


def clipped_surrogate(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    reduction: str,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss over `mask` and the clipped fractions.

    `reduction`: "token": mean over all tokens; "seq": mean over the tokens of each row, then over rows that have any.
    """
    mask = jnp.asarray(mask, bool)
    # Selected first: a NaN outside the mask would survive in the gradient of a select at the end.
    log_probs, old_log_probs, advantages = (jnp.where(mask, x, 0.0) for x in (log_probs, old_log_probs, advantages))
    terms, where = surrogate_terms(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    weights = reduction_weights(mask, reduction)
    loss = jnp.sum(weights * terms)
    tokens = jnp.maximum(jnp.sum(mask), 1)
    return loss, {f"clip_{name}": jnp.sum(flag & mask) / tokens for name, flag in where.items()}


def reduction_weights(mask: Bool[Array, "B T"], reduction: str) -> Float[Array, "B T"]:
    """Returns the weight of every token in the loss; they sum to 1 (to 0 if there is no token)."""
    xp = namespace(mask)
    count = xp.sum(mask, axis=1, keepdims=True)
    if reduction == "token":
        return mask / xp.maximum(xp.sum(count), 1)
    if reduction == "seq":
        return mask / xp.maximum(count, 1) / xp.maximum(xp.sum(count > 0), 1)
    raise ValueError(f"reduction={reduction!r} is not one of token, seq")


def importance_weights(recomputed: Float[Array, "..."], sampled: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Returns min(pi_learner / pi_sampler, cap): corrects for the numerical mismatch of the two (arXiv 2510.18927)."""
    log_ratio = jnp.clip(recomputed - sampled, -_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))
