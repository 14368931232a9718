"""Counter-based Gumbel noise: the same bits on every backend, for any tiling of the vocabulary.

Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain integer arithmetic, so
that Pallas kernels and XLA compute it alike. The counter is (vocabulary id, attempt); the key is the row's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(
    key0: UInt32[Array, "..."], key1: UInt32[Array, "..."], x0: UInt32[Array, "..."], x1: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    """Returns the first word of Threefry-2x32 (20 rounds) of counter (x0, x1) under key (key0, key1)."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0


def gumbel(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Returns standard Gumbel noise, between -2.9 and 22.2, from random words.

    Large values decide who wins among many tokens, so that is where the bits go: they come from numbers near 0, which
    float32 resolves to 2^-32. A uniform number near 1 has 2^-24 steps: among 150,000 tokens, ties in one draw of fifty.
    """
    # Through int32: Mosaic converts signed integers only.
    uniform = ((bits >> jnp.uint32(1)).astype(jnp.int32).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-31)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))))
