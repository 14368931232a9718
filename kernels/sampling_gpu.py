"""The sampling kernel for GPUs, through Pallas' Triton backend: logits stay in registers.

The programs of a GPU run side by side, so each looks at one tile of the vocabulary for one block of rows, and writes the
sums and the four largest perturbed logits; a few numbers a tile are then merged by XLA. Blocks of rows are the grid's
first axis: the programs that run together find their tile of the head in the cache. Interpreted and lowered to Triton in
the tests; compiled by XLA for GPUs, never timed on one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels.logits import precision
from kernels.noise import gumbel, threefry
from kernels.sampling_xla import CANDIDATES, LOWEST, Above, Partial

TILE = 128  # vocabulary entries a program
ROWS = 64  # at most a program: rows x TILE numbers of several kinds must fit into its registers
DEPTH = 64  # of the hidden size, multiplied at a time
AT_ONCE = CANDIDATES  # each call of `above` reads the head


def look(
    hidden: Float[Array, "B D"],
    lm_head: Float[Array, "V D"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    noise: Float[Array, "B"],
    banned: Bool[Array, "V"] | None,
    floor: Float[Array, "B"],
    attempt: Int[Array, ""],
    first_id: Int[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Partial, Above]:
    """Returns what `sampling_xla.look` returns. A hidden size that is no multiple of 16 costs a padded copy of the head."""
    odd = -hidden.shape[1] % 16
    if odd:
        hidden, lm_head = (jnp.pad(x, ((0, 0), (0, odd))) for x in (hidden, lm_head))
    rows, width = hidden.shape
    depth = math.gcd(width, DEPTH)
    vocabulary = lm_head.shape[0]
    tiles = pl.cdiv(vocabulary, TILE)
    block = min(ROWS, max(16, pl.next_power_of_2(rows)))
    padded_rows = pl.cdiv(rows, block) * block
    allowed = jnp.ones(vocabulary, jnp.int32) if banned is None else (~banned).astype(jnp.int32)

    def pad(x):
        return jnp.pad(x, ((0, padded_rows - rows), *((0, 0),) * (x.ndim - 1)))

    def call(kernel, columns, outputs, name):
        some = [pl.BlockSpec((*x.shape[:-1], block), lambda row, _, n=x.ndim: (0,) * (n - 1) + (row,)) for x in columns]
        return pl.pallas_call(
            functools.partial(kernel, vocabulary=vocabulary, depth=depth),
            grid=(padded_rows // block, tiles),
            in_specs=[
                pl.BlockSpec((block, width), lambda row, _: (row, 0)),
                pl.BlockSpec(lm_head.shape, lambda row, _: (0, 0)),
                pl.BlockSpec(allowed.shape, lambda row, _: (0,)),
                *some,
            ],
            out_specs=[pl.BlockSpec((1, lanes, block), lambda row, tile: (tile, 0, row)) for lanes, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct((tiles, lanes, padded_rows), kind) for lanes, kind in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=8 if block == ROWS else 4, num_stages=3),
            interpret=interpret,
            name=name,
        )(operand, lm_head, allowed, *columns)

    operand = pad(hidden.astype(jnp.result_type(hidden, lm_head)))
    scale = pad(temperature).at[rows:].set(1.0)
    scalars = (pad(jnp.broadcast_to(x.astype(jnp.int32), (rows,))) for x in (attempt, first_id))
    sums, token, logit, perturbed = call(
        _look,
        (scale, pad(words[:, 0]), pad(words[:, 1]), pad(noise), pad(floor), *scalars),
        ((4, jnp.float32), (CANDIDATES, jnp.int32), (CANDIDATES, jnp.float32), (CANDIDATES, jnp.float32)),
        "sample_with_entropy",
    )
    tops, totals, moments = (sums[:, i, :rows] for i in range(3))
    top = tops.max(axis=0)
    shift = tops - top
    moment = jnp.sum(jnp.exp(shift) * (moments + jnp.where(totals > 0, shift * totals, 0.0)), axis=0)
    token, logit, perturbed = (x[:, :, :rows].reshape(-1, rows).T for x in (token, logit, perturbed))
    best = jax.lax.top_k(perturbed, CANDIDATES)[1]  # of equals the first: the lowest id

    def above(thresholds, over):
        outputs = ((CANDIDATES, jnp.float32), (CANDIDATES, jnp.int32))
        mass, count = call(_count, (scale, pad(thresholds).T, pad(over)), outputs, "tokens_above")
        return mass.sum(axis=0).T[:rows], count.sum(axis=0).T[:rows]

    token, logit, perturbed = (jnp.take_along_axis(x, best, axis=1) for x in (token, logit, perturbed))
    return Partial(token, logit, perturbed, top, jnp.sum(jnp.exp(shift) * totals, axis=0), moment), above


def _logits(hidden_ref, head_ref, allowed_ref, temperature_ref, vocabulary, depth):
    """Returns ids [T], which of them are allowed, and the tile's logits [B, T]."""
    ids = pl.program_id(1) * TILE + jnp.arange(TILE)
    near = jnp.minimum(ids, vocabulary - 1)  # the last tile reads its last row again
    rows, width = hidden_ref.shape

    def multiply(step, total):
        span = pl.ds(step * depth, depth)
        hidden, head = hidden_ref[:, span], head_ref[near, span]
        return total + plgpu.dot(hidden, head.astype(hidden.dtype), trans_b=True, precision=precision(head))

    product = jax.lax.fori_loop(0, width // depth, multiply, jnp.zeros((rows, TILE), jnp.float32))
    allowed = (allowed_ref[near] > 0) & (ids < vocabulary)
    return ids, allowed, jnp.where(allowed[None], product / temperature_ref[...][:, None], LOWEST)


def _look(
    hidden_ref, head_ref, allowed_ref, temperature_ref, key0_ref, key1_ref, noise_ref, floor_ref, attempt_ref, first_ref,
    sums_ref, token_ref, logit_ref, perturbed_ref, *, vocabulary, depth,
):  # fmt: skip
    ids, allowed, logits = _logits(hidden_ref, head_ref, allowed_ref, temperature_ref, vocabulary, depth)
    top = jnp.max(logits, axis=1)
    shifted = logits - top[:, None]
    weights = jnp.where(allowed[None], jnp.exp(shifted), 0.0)
    sums_ref[0, 0, :] = top
    sums_ref[0, 1, :] = jnp.sum(weights, axis=1)
    sums_ref[0, 2, :] = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=1)
    sums_ref[0, 3, :] = jnp.zeros_like(top)
    names = first_ref[...][:, None] + ids[None]
    counter = jnp.broadcast_to(attempt_ref[...][:, None], names.shape).astype(jnp.uint32)
    bits = threefry(key0_ref[...][:, None], key1_ref[...][:, None], names.astype(jnp.uint32), counter)
    values = jnp.where(logits > floor_ref[...][:, None], logits + noise_ref[...][:, None] * gumbel(bits), LOWEST)
    for place in range(CANDIDATES):
        best = jnp.max(values, axis=1)
        chosen = jnp.min(jnp.where(values == best[:, None], ids[None], jnp.int32(2**30)), axis=1)
        here = ids[None] == chosen[:, None]
        token_ref[0, place, :] = chosen + first_ref[...]
        logit_ref[0, place, :] = jnp.max(jnp.where(here, logits, LOWEST), axis=1)
        perturbed_ref[0, place, :] = best
        values = jnp.where(here, LOWEST, values)


def _count(
    hidden_ref, head_ref, allowed_ref, temperature_ref, threshold_ref, top_ref, mass_ref, count_ref, *, vocabulary, depth
):
    _, allowed, logits = _logits(hidden_ref, head_ref, allowed_ref, temperature_ref, vocabulary, depth)
    weights = jnp.where(allowed[None], jnp.exp(logits - top_ref[...][:, None]), 0.0)
    for place in range(CANDIDATES):
        above = logits > threshold_ref[place, :][:, None]
        mass_ref[0, place, :] = jnp.sum(jnp.where(above, weights, 0.0), axis=1)
        count_ref[0, place, :] = jnp.sum(jnp.where(above, 1, 0), axis=1)
