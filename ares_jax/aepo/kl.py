"""Token-wise dynamic KL (section 3.2.2, App. F and K): how far each token may move from the reference policy."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ares_jax.aepo.namespace import namespace

ESTIMATORS = ("k1", "abs", "mse", "k3")
_CLAMP = 10.0  # of the estimate, nats
_RATIO_CLAMP = 20.0


def per_token_kl(log_probs: Float[Array, "..."], ref_log_probs: Float[Array, "..."], estimator: str) -> Float[Array, "..."]:
    """Returns an estimate of KL(policy || reference) at tokens drawn from the policy, in nats, clamped to +-10.

    With d = log pi_ref - log pi: "k1" is -d, "abs" |d|, "mse" d^2 / 2, "k3" exp(d) - d - 1 (Schulman, "Approximating KL
    divergence", 2020, http://joschu.net/blog/kl-approx.html).
    """
    d = jnp.clip(ref_log_probs - log_probs, -_RATIO_CLAMP, _RATIO_CLAMP)
    estimates = {"k1": lambda: -d, "abs": lambda: jnp.abs(d), "mse": lambda: 0.5 * d**2, "k3": lambda: jnp.expm1(d) - d}
    if estimator not in estimates:
        raise ValueError(f"kl.estimator={estimator!r} is not one of {', '.join(estimates)}")
    return jnp.clip(estimates[estimator](), -_CLAMP, _CLAMP)


def token_weights(
    kappa: Float[Array, "3"], difficulty: Int[Array, "..."], in_window: Bool[Array, "..."], rho: float
) -> Float[Array, "..."]:
    """Returns beta_t = kappa_d * rho^m_t: relaxed inside validated windows, full elsewhere."""
    xp = namespace(kappa, difficulty, in_window)
    return xp.asarray(kappa)[difficulty] * xp.where(in_window, rho, 1.0)


def updated_controller(
    kappa: Float[Array, "3"],
    observed: Float[Array, "3"],
    target: Float[Array, "3"],
    *,
    rate: float,
    minimum: float,
    maximum: float,
) -> Float[Array, "3"]:
    """Returns kappa_d <- clip(kappa_d (1 + rate (observed_d / target_d - 1))), `observed` over non-window tokens only.

    A bucket without such tokens has NaN there and keeps its weight.
    """
    moved = jnp.clip(kappa * (1 + rate * (observed / target - 1)), minimum, maximum)
    return jnp.where(jnp.isnan(moved), kappa, moved)
