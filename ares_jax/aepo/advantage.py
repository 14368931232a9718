"""Advantages of leaves within their group: GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EPS = 1e-6


@partial(jax.jit, static_argnames="baseline")
def group_normalized(rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, baseline: str = "grpo") -> Float[Array, "N"]:
    """Returns the advantage of every leaf. A group of one leaf has none: 0.

    Args:
      rewards: of all leaves.
      group_ids: any numbers; leaves of equal number share a prompt.
      baseline: "grpo": (R - mean) / (std + eps), sample standard deviation; "rloo": R minus the mean of the others.
    """
    rewards = jnp.asarray(rewards)
    count = len(rewards)
    ids = jnp.unique(jnp.asarray(group_ids), return_inverse=True, size=count)[1]

    def per_group(x):
        return jax.ops.segment_sum(x, ids, count)[ids]

    size = per_group(jnp.ones_like(rewards))
    centered = rewards - per_group(rewards) / size
    # Once more: what rounding leaves of equal rewards is not small beside eps in float32 (seen: advantages of 0.2).
    centered = centered - per_group(centered) / size
    others = jnp.maximum(size - 1, 1)
    if baseline == "grpo":
        return jnp.where(size > 1, centered / (jnp.sqrt(per_group(centered**2) / others) + _EPS), 0.0)
    if baseline == "rloo":
        return jnp.where(size > 1, centered * size / others, 0.0)
    raise ValueError(f"baseline={baseline!r} is not one of grpo, rloo")
