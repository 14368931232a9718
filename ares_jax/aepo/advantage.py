"""Advantages of leaves within their group: GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_EPS = 1e-6


def group_normalized(rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, baseline: str = "grpo") -> Float[Array, "N"]:
    """Returns the advantage of every leaf. A group of one leaf has none: 0.

    Args:
      rewards: of all leaves.
      group_ids: any numbers; leaves of equal number share a prompt.
      baseline: "grpo": (R - mean) / (std + eps), sample standard deviation; "rloo": R minus the mean of the others.
    """
    if not isinstance(group_ids, jax.Array):  # as they are: in 32 bits two large numbers might become one
        group_ids = np.unique(group_ids, return_inverse=True)[1]
    return _normalized(rewards, group_ids, baseline=baseline)


@partial(jax.jit, static_argnames="baseline")
def _normalized(rewards, group_ids, *, baseline):
    rewards = jnp.asarray(rewards) * 1.0  # of whole numbers or booleans, too
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
