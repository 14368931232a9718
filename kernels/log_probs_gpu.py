"""The learner's log-probabilities for GPUs, through Pallas' Triton backend: the forward pass, logits stay in registers.

A program goes through the whole vocabulary with one block of tokens; nothing but four numbers a token is written. The
backward pass is `log_probs_xla`'s: a block's gradient, tokens x D in float32, is more than a program's registers hold.
Interpreted in the tests and compiled there by XLA for a GPU; never timed on one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels.logits import precision, statistics
from kernels.sampling_xla import LOWEST

TILE = 128  # vocabulary entries a step
ROWS = 64  # tokens at most a program
DEPTH = 64  # of the hidden size, multiplied at a time


def forward(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    banned: Bool[Array, "V"] | None,
    temperature: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N"], ...]:
    """Returns log-probability, entropy, the largest logit, and the log of the sum of exponentials less it.

    A D that is no multiple of 16 costs a padded copy of the head.
    """
    count, odd = len(hidden), -hidden.shape[1] % 16
    if odd:
        hidden, lm_head = (jnp.pad(x, ((0, 0), (0, odd))) for x in (hidden, lm_head))
    size = min(ROWS, max(16, pl.next_power_of_2(count)))
    padding = -count % size
    hidden = jnp.pad(hidden.astype(jnp.result_type(hidden, lm_head)), ((0, padding), (0, 0)))
    targets = jnp.pad(targets.astype(jnp.int32), (0, padding))
    allowed = jnp.ones(len(lm_head), jnp.int32) if banned is None else (~banned).astype(jnp.int32)
    row = pl.BlockSpec((size,), lambda block: (block,))
    results = pl.pallas_call(
        functools.partial(_forward, temperature=temperature),
        grid=(len(hidden) // size,),
        in_specs=[
            pl.BlockSpec((size, hidden.shape[1]), lambda block: (block, 0)),
            pl.BlockSpec(lm_head.shape, lambda block: (0, 0)),
            pl.BlockSpec(allowed.shape, lambda block: (0,)),
            row,
        ],
        out_specs=[row] * 4,
        out_shape=[jax.ShapeDtypeStruct((len(hidden),), jnp.float32)] * 4,
        compiler_params=plgpu.CompilerParams(num_warps=8 if size == ROWS else 4, num_stages=3),
        interpret=interpret,
        name="token_log_probs",
    )(hidden, lm_head, allowed, targets)
    top, total, moment, logit = (x[:count] for x in results)
    return statistics(top, total, moment, jnp.where(logit > LOWEST, logit, -jnp.inf))  # -inf: a banned target's


def _forward(hidden_ref, head_ref, allowed_ref, target_ref, top_ref, total_ref, moment_ref, logit_ref, *, temperature):
    (rows, width), vocabulary = hidden_ref.shape, len(head_ref)
    depth = math.gcd(width, DEPTH)
    target = target_ref[...]

    def look(tile, carry):
        top, total, moment, logit = carry
        ids = tile * TILE + jnp.arange(TILE)
        near = jnp.minimum(ids, vocabulary - 1)  # the last tile reads its last row again

        def multiply(step, product):
            span = pl.ds(step * depth, depth)
            hidden, head = hidden_ref[:, span], head_ref[near, span]
            return product + plgpu.dot(hidden, head.astype(hidden.dtype), trans_b=True, precision=precision(head))

        product = jax.lax.fori_loop(0, width // depth, multiply, jnp.zeros((rows, TILE), jnp.float32))
        allowed = (allowed_ref[near] > 0) & (ids < vocabulary)
        logits = jnp.where(allowed[None], product / temperature, LOWEST)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        shifted = logits - new[:, None]
        weights = jnp.where(allowed[None], jnp.exp(shifted), 0.0)
        shift = jnp.where(total == 0.0, 0.0, top - new)
        decay = jnp.exp(shift)
        fresh = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=1)
        here = jnp.max(jnp.where(ids[None] == target[:, None], logits, LOWEST), axis=1)
        return (
            new, decay * total + jnp.sum(weights, axis=1), decay * (moment + shift * total) + fresh,
            jnp.maximum(logit, here),
        )  # fmt: skip

    lowest, zeros = jnp.full(rows, LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32)
    results = jax.lax.fori_loop(0, pl.cdiv(vocabulary, TILE), look, (lowest, zeros, zeros, lowest))
    for ref, value in zip((top_ref, total_ref, moment_ref, logit_ref), results, strict=True):
        ref[...] = value
