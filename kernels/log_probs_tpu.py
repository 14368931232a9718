"""The learner's log-probabilities for TPUs: tiles of tokens and vocabulary, whose logits never leave fast memory.

A tile is [vocabulary, tokens], so that what there is one of a token lies along the lanes. `_forward` streams the head for
each block of tokens and carries, in float32, the running maximum m, the sum l of exp(z - m) and the shifted moment s of
(z - m) exp(z - m). Backwards, two kernels compute the tiles again: one streams the head and sums a block of tokens'
gradient, the other streams the tokens and sums a tile of the head's, both in float32. So nothing is summed in main memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels.logits import precision, statistics
from kernels.sampling_xla import LOWEST

TILE = 512  # vocabulary entries a step
ROWS = 512  # tokens at most a step: the head is streamed once for so many
LANES = 128


def forward(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    banned: Bool[Array, "V"] | None,
    temperature: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N"], ...]:
    """Returns log-probability, entropy, the largest logit, and the log of the sum of exponentials less it."""
    operands, size = _operands(hidden, lm_head, targets, banned)
    padded = operands[0].shape[0]
    results = pl.pallas_call(
        functools.partial(_forward, temperature=temperature),
        grid=(padded // size, pl.cdiv(lm_head.shape[0], TILE)),
        in_specs=_specs(hidden.shape[1], size, token=0, entry=1),
        out_specs=[pl.BlockSpec((1, size), lambda i, j: (0, i))] * 4,
        out_shape=[jax.ShapeDtypeStruct((1, padded), jnp.float32)] * 4,
        **_options("token_log_probs", operands, products=1, passes=padded // size, interpret=interpret),
    )(*operands)
    top, total, moment, logit = (x[0, : hidden.shape[0]] for x in results)
    return statistics(top, total, moment, jnp.where(logit > LOWEST, logit, -jnp.inf))  # -inf: a banned target's


def backward(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    banned: Bool[Array, "V"] | None,
    temperature: float,
    rows: Float[Array, "5 N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Returns the gradients. `rows`: the last three of `forward`, and the gradients of the first two."""
    width = hidden.shape[1]
    operands, size = _operands(hidden, lm_head, targets, banned, rows)
    padded = operands[0].shape[0]
    blocks, tiles = padded // size, pl.cdiv(lm_head.shape[0], TILE)

    def call(kernel, name, grid, block, result, passes, **order):
        return pl.pallas_call(
            functools.partial(kernel, temperature=temperature),
            grid=grid,
            in_specs=[*_specs(width, size, **order), pl.BlockSpec((5, size), lambda *at: (0, at[order["token"]]))],
            out_specs=pl.BlockSpec((block, width), lambda i, j: (i, 0)),
            out_shape=result,
            scratch_shapes=[pltpu.VMEM((block, width), jnp.float32)],
            **_options(name, operands, products=2, passes=passes, interpret=interpret),
        )(*operands)

    result = jax.ShapeDtypeStruct((padded, width), hidden.dtype)
    d_hidden = call(
        functools.partial(_d_hidden, vocabulary=lm_head.shape[0]), "token_log_probs_d_hidden", (blocks, tiles), size, result,
        blocks, token=0, entry=1,
    )  # fmt: skip
    result = jax.ShapeDtypeStruct(lm_head.shape, lm_head.dtype)
    d_head = call(_d_head, "token_log_probs_d_head", (tiles, blocks), TILE, result, 1, token=1, entry=0)
    return d_hidden[: hidden.shape[0]], d_head


def _operands(hidden, lm_head, targets, banned, rows=None):
    """Returns the kernels' arguments, tokens padded with zeros to whole blocks, and a block's size."""
    count, vocabulary = len(hidden), len(lm_head)
    size = min(ROWS, -(-count // LANES) * LANES)
    tokens = ((0, 0), (0, -count % size))
    allowed = jnp.ones(vocabulary, jnp.float32) if banned is None else jnp.where(banned, 0.0, 1.0)
    kind = jnp.result_type(hidden, lm_head)
    operands = [
        jnp.pad(hidden.astype(kind), tokens[::-1]),
        lm_head,
        jnp.pad(allowed, (0, -vocabulary % TILE))[None],
        jnp.pad(targets.astype(jnp.int32)[None], tokens),
    ]
    return operands if rows is None else [*operands, jnp.pad(rows, tokens)], size


def _specs(width: int, size: int, *, token: int, entry: int):
    """Returns the blocks of hidden states, head, allowed and targets; axis `token` of the grid goes over the tokens."""
    return [
        pl.BlockSpec((size, width), lambda *at: (at[token], 0)),
        pl.BlockSpec((TILE, width), lambda *at: (at[entry], 0)),
        pl.BlockSpec((1, TILE), lambda *at: (0, at[entry])),
        pl.BlockSpec((1, size), lambda *at: (0, at[token])),
    ]


def _options(name, operands, *, products, passes, interpret):
    """`products`: matrix products of a tile; `passes`: how often the head is read."""
    hidden, head = operands[:2]
    (tokens, width), vocabulary = hidden.shape, len(head)
    return dict(
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * tokens * vocabulary * width,
            bytes_accessed=passes * head.nbytes + hidden.nbytes,
            transcendentals=tokens * vocabulary,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=name,
    )


def _logits(hidden_ref, head_ref, allowed_ref, tile, temperature):
    """Returns a tile's ids [T, 1], which are allowed [T, 1], and its logits [T, R]."""
    ids = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
    # What lies beyond the vocabulary's end may be anything at all: it is masked by selects, never by products.
    allowed = jnp.transpose(jnp.broadcast_to(allowed_ref[...], (8, TILE)))[:, :1] > 0.5
    head = head_ref[...].astype(hidden_ref.dtype)
    return ids, allowed, jnp.where(allowed, _product(head, hidden_ref[...], 1, 1) / temperature, LOWEST)


def _product(a, b, of_a: int, of_b: int):
    """Returns the product, in float32, summed over these axes of two matrices."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, precision=precision(a))


def _forward(hidden_ref, head_ref, allowed_ref, target_ref, top_ref, total_ref, moment_ref, logit_ref, *, temperature):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(top_ref.shape, jnp.float32)
        moment_ref[...] = jnp.zeros(top_ref.shape, jnp.float32)
        logit_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)

    ids, allowed, logits = _logits(hidden_ref, head_ref, allowed_ref, tile, temperature)
    top, total = top_ref[...], total_ref[...]
    new = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
    shifted = logits - new
    weights = jnp.where(allowed, jnp.exp(shifted), 0.0)
    shift = jnp.where(total == 0.0, 0.0, top - new)
    decay = jnp.exp(shift)
    moment = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=0, keepdims=True)
    moment_ref[...] = decay * (moment_ref[...] + shift * total) + moment
    total_ref[...] = decay * total + jnp.sum(weights, axis=0, keepdims=True)
    top_ref[...] = new
    here = jnp.max(jnp.where(ids == target_ref[...], logits, LOWEST), axis=0, keepdims=True)
    logit_ref[...] = jnp.maximum(logit_ref[...], here)


def _d_logits(hidden_ref, head_ref, allowed_ref, target_ref, rows_ref, tile, temperature):
    """Returns a tile's ids [T, 1] and the gradient of its products [T, R]."""
    ids, allowed, logits = _logits(hidden_ref, head_ref, allowed_ref, tile, temperature)
    entropy, top, log_total, g_log_prob, g_entropy = (rows_ref[i : i + 1] for i in range(5))
    log_p = logits - top - log_total
    p = jnp.where(allowed, jnp.exp(log_p), 0.0)
    surprise = jnp.where(p > 0, log_p, 0.0) + entropy
    d_logits = g_log_prob * (jnp.where(ids == target_ref[...], 1.0, 0.0) - p) - g_entropy * p * surprise
    return ids, (d_logits / temperature).astype(hidden_ref.dtype)


def _d_hidden(hidden_ref, head_ref, allowed_ref, target_ref, rows_ref, out_ref, sum_ref, *, temperature, vocabulary):
    tile = pl.program_id(1)
    ids, d_logits = _d_logits(hidden_ref, head_ref, allowed_ref, target_ref, rows_ref, tile, temperature)
    head = jnp.where(ids < vocabulary, head_ref[...], 0).astype(d_logits.dtype)  # 0 times a NaN beyond the end is NaN
    _add(sum_ref, out_ref, _product(d_logits, head, 0, 0))


def _d_head(hidden_ref, head_ref, allowed_ref, target_ref, rows_ref, out_ref, sum_ref, *, temperature):
    _, d_logits = _d_logits(hidden_ref, head_ref, allowed_ref, target_ref, rows_ref, pl.program_id(0), temperature)
    _add(sum_ref, out_ref, _product(d_logits, hidden_ref[...], 1, 0))


def _add(sum_ref, out_ref, part):
    """Adds to a sum over the grid's inner axis; the last step of it writes the sum out."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    sum_ref[...] += part

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
