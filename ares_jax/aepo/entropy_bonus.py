"""Algorithm 1's token bonus: an advantage for exploring inside validated windows (off by default)."""

from jaxtyping import Array, Bool, Float

from ares_jax.aepo.namespace import namespace


def token_bonus(
    window_means: Float[Array, "..."], window_mask: Bool[Array, "..."], tau: float, weight: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """Returns psi = weight * phi([mean - tau]+) * m, with phi(x) = log(1 + x): nothing outside validated windows."""
    xp = namespace(window_means, window_mask, weight)
    return xp.where(window_mask, weight * xp.log1p(xp.maximum(window_means - tau, 0.0)), 0.0)
