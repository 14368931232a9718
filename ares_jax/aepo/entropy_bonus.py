"""Algorithm 1's token bonus: an advantage for exploring inside validated windows (off by default)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def token_bonus(
    window_means: Float[Array, "..."], window_mask: Bool[Array, "..."], tau: float, weight: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """Returns psi = weight * phi([mean - tau]+) * m, with phi(x) = log(1 + x): nothing outside validated windows."""
    return jnp.where(window_mask, weight * jnp.log1p(jnp.maximum(window_means - tau, 0.0)), 0.0)
