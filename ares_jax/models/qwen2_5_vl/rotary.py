"""Rotary positions: multimodal (text decoder) and two-dimensional (vision tower)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mrope_angles(
    positions: Int[Array, "... 3 T"], *, head_dim: int, section: tuple[int, int, int], theta: float
) -> Float[Array, "... T F"]:
    """Returns the angle of each of the F = head_dim / 2 pairs: `section` says how many turn with time, height, width.

    Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    axis = jnp.repeat(jnp.arange(3), jnp.array(section), total_repeat_length=head_dim // 2)
    return jnp.moveaxis(positions, -2, -1).astype(jnp.float32)[..., axis] * frequencies


def vision_angles(position_hw: Int[Array, "... P 2"], *, head_dim: int) -> Float[Array, "... P F"]:
    """Returns the angles of a patch: the first half of the pairs turn with its row, the second with its column."""
    frequencies = 1.0 / 10_000.0 ** (jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    angles = position_hw.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*angles.shape[:-2], head_dim // 2)


def cos_sin(angles: Float[Array, "... T F"]) -> Float[Array, "2 ... T F"]:
    """Returns cosines and sines, to be made once for all layers and heads.

    Without the barrier XLA makes them again in every layer: 7 of 249 ms of a decoding step of 64 rows on a CPU.
    """
    return jax.lax.optimization_barrier(jnp.stack([jnp.cos(angles), jnp.sin(angles)]))


def apply_rotary(x: Float[Array, "... T N H"], rotation: Float[Array, "2 ... T F"]) -> Float[Array, "... T N H"]:
    """Turns the pairs (i, i + H/2) of every head, in float32."""
    cos, sin = rotation[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
