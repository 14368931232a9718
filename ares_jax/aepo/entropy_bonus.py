"""Algorithm 1's token bonus: an advantage for exploring inside validated windows (off by default).

psi_t = lambda_d phi([mean_t - tau]+) m_t - b. Its lambda_d is a setting, `aepo.entropy_bonus` times a factor of the bucket,
not the reward's multiplier: for easy problems that grows with their excess and would pay for more of it. b is 0 or the mean
of the first term (`aepo.batch.token_fields`).
"""

from jaxtyping import Array, Bool, Float

from ares_jax.aepo.namespace import namespace


def token_bonus(
    window_means: Float[Array, "..."], window_mask: Bool[Array, "..."], tau: float, weight: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """Returns weight * phi([mean - tau]+) * m, with phi(x) = log(1 + x): nothing outside validated windows."""
    xp = namespace(window_means, window_mask, weight)
    return xp.where(window_mask, weight * xp.log1p(xp.maximum(window_means - tau, 0.0)), 0.0)
