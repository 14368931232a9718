"""Window means by Pallas, for TPUs and GPUs: one step of decoding in one launch, and means of whole trajectories.

Both add in their twin's order and return its bits. A step is a few numbers a row: what it saves is the launches of the
fused loops that XLA makes of it, and nothing was timed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

LANES = 128
ROWS = 8  # trajectories a program
SPAN = 1024  # positions a program on a GPU; on a TPU it has the whole row


def step(
    entropies: Float[Array, "B W"],
    tokens: Int[Array, "B W"],
    entropy: Float[Array, "B"],
    token: Int[Array, "B"],
    active: Bool[Array, "B"],
    full: Bool[Array, "B"],
    starts: Bool[Array, "B"],
    tau_high: Float[Array, "B"],
    *,
    name: str,
    interpret: bool,
) -> tuple[Float[Array, "B W"], Int[Array, "B W"], Float[Array, "B"], Bool[Array, "B"]]:
    """Returns both rings, the mean of the window that ends here (0 if there is none), and whether it is a hit.

    `full`: the ring is complete with this entropy; `starts`: its oldest token, then, is a trigger.
    """
    rows, window = entropies.shape
    size = max(LANES, pl.next_power_of_2(rows))

    def along(values, kind):  # a row's value at its lane
        return jnp.pad(jnp.stack(values).astype(kind), ((0, 0), (0, size - rows)))

    floats, integers = along((*entropies.T, entropy, tau_high), jnp.float32), along((*tokens.T, token), jnp.int32)
    flags = along((active, full, starts), jnp.int32)
    outputs = [((window, size), jnp.float32), ((window, size), jnp.int32), ((1, size), jnp.float32), ((1, size), jnp.int32)]
    entropies, tokens, mean, hit = pl.pallas_call(
        functools.partial(_step, window=window),
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        name="window_step",
        **_how(name, interpret),
    )(floats, integers, flags)
    return entropies[:, :rows].T, tokens[:, :rows].T, mean[0, :rows], hit[0, :rows] > 0


def _step(floats_ref, integers_ref, flags_ref, entropies_ref, tokens_ref, mean_ref, hit_ref, *, window):
    def at(ref, place):
        return ref[pl.ds(place, 1), :]

    active, full, starts = (at(flags_ref, i) > 0 for i in range(3))
    total = jnp.zeros(active.shape, jnp.float32)
    for i in range(window):
        value = jnp.where(active, at(floats_ref, i + 1), at(floats_ref, i))
        total = total + value if i else value
        entropies_ref[pl.ds(i, 1), :] = value
        tokens_ref[pl.ds(i, 1), :] = jnp.where(active, at(integers_ref, i + 1), at(integers_ref, i))
    mean = jnp.where(active & full, total * jnp.float32(1 / window), 0.0)
    mean_ref[...] = mean
    hit_ref[...] = jnp.where(active & full & starts & (mean >= at(floats_ref, window + 1)), 1, 0)


def means(
    entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], window: int, *, name: str, interpret: bool
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns what `window_means` returns."""
    rows, length = entropy.shape
    spans = pl.cdiv(length, SPAN) if name == "gpu" else 1
    size = SPAN if name == "gpu" else pl.cdiv(length, LANES) * LANES
    padding = (0, -rows % ROWS), (0, spans * size + pl.cdiv(window, LANES) * LANES - length)
    entropy, allowed = jnp.pad(entropy, padding), jnp.pad(mask.astype(jnp.int32), padding)
    whole = pl.BlockSpec((ROWS, entropy.shape[1]), lambda i, j: (i, 0))
    part = pl.BlockSpec((ROWS, size), lambda i, j: (i, j))
    mean, complete = pl.pallas_call(
        functools.partial(_means, window=window, size=size, spans=spans),
        grid=(entropy.shape[0] // ROWS, spans),
        in_specs=[whole, whole],
        out_specs=[part, part],
        out_shape=[jax.ShapeDtypeStruct((entropy.shape[0], spans * size), kind) for kind in (jnp.float32, jnp.int32)],
        name="window_means",
        **_how(name, interpret),
    )(entropy, allowed)
    return mean[:rows, :length], complete[:rows, :length] > 0


def _means(entropy_ref, mask_ref, mean_ref, complete_ref, *, window, size, spans):
    first = pl.program_id(1) * size if spans > 1 else 0
    total, complete = jnp.zeros((ROWS, size), jnp.float32), jnp.ones((ROWS, size), bool)
    for offset in range(window):
        span = pl.ds(first + offset, size)
        inside = mask_ref[:, span] > 0
        value = jnp.where(inside, entropy_ref[:, span], 0.0)
        total = total + value if offset else value
        complete = complete & inside
    mean_ref[...] = jnp.where(complete, total * jnp.float32(1 / window), 0.0)
    complete_ref[...] = jnp.where(complete, 1, 0)


def _how(name: str, interpret: bool) -> dict:
    if name == "gpu":
        return dict(compiler_params=plgpu.CompilerParams(num_warps=4), interpret=interpret)
    return dict(compiler_params=pltpu.CompilerParams(), interpret=pltpu.InterpretParams() if interpret else False)
