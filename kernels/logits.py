"""The one definition of a distribution over tokens, shared by the sampler and the learner's normaliser.

If both did not divide, ban and round alike, the importance ratio of an unchanged policy would differ from 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def precision(*arrays: Array) -> jax.lax.Precision | None:
    """Returns the matmul precision: accelerators would otherwise round float32 inputs to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*arrays) == jnp.float32 else None


def token_logits(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    temperature: float | Float[Array, "N 1"],
    banned: Bool[Array, "V"] | None,
) -> Float[Array, "N V"]:
    """Returns float32 logits divided by the temperature, -inf at banned tokens."""
    return scale_and_mask(raw_logits(hidden, lm_head), temperature, banned)


def raw_logits(hidden: Float[Array, "N D"], lm_head: Float[Array, "V D"]) -> Float[Array, "N V"]:
    """Returns float32 logits at temperature 1, of every token."""
    count = len(hidden)
    if count == 1 and hidden.dtype == jnp.bfloat16:
        hidden = jnp.pad(hidden, ((0, 1), (0, 0)))  # XLA's CPU code for one such row takes ten times as long as for two
    wide = jnp.einsum("ND,VD->NV", hidden, lm_head, preferred_element_type=jnp.float32, precision=precision(hidden, lm_head))
    return wide[:count]


def scale_and_mask(
    raw: Float[Array, "... V"], temperature: float | Float[Array, "..."], banned: Bool[Array, "V"] | None
) -> Float[Array, "... V"]:
    """Returns `raw_logits` over the temperature, -inf at banned tokens."""
    logits = raw / temperature
    return logits if banned is None else jnp.where(banned, -jnp.inf, logits)


def statistics(
    top: Float[Array, "..."], total: Float[Array, "..."], moment: Float[Array, "..."], logit: Float[Array, "..."]
) -> tuple[Float[Array, "..."], ...]:
    """Returns log-probability, entropy, the largest logit, and the log of the sum of exponentials less it.

    `total`, `moment`: the sums of exp(z - top) and (z - top) exp(z - top) over the tokens; `logit`: the target's.
    """
    log_total = jnp.log(total)
    return logit - top - log_total, log_total - moment / total, top, log_total
