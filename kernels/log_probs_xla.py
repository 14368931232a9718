"""The plain-XLA form of the learner's log-probabilities: chunks of tokens, each with its logits over the vocabulary."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.logits import precision, raw_logits, scale_and_mask, statistics, token_logits
from kernels.rows import each_row

LOGITS = 1024 * 151_936  # at most held at one time, however large the vocabulary
CHUNK = 1024  # tokens at most


def chunk_of(vocabulary: int) -> int:
    """Returns the tokens whose logits are held at one time."""
    return max(1, min(CHUNK, LOGITS // vocabulary))


def forward(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    banned: Bool[Array, "V"] | None,
    temperature: float,
    *,
    chunk: int,
) -> tuple[Float[Array, "N"], ...]:
    """Returns log-probability, entropy, the largest logit, and the log of the sum of exponentials less it."""

    def of_row(row):
        raw, target = row
        logits = scale_and_mask(raw, temperature, banned)
        top = jnp.max(logits)
        shifted = logits - top
        weights = jnp.exp(shifted)
        moment = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0))
        return statistics(top, jnp.sum(weights), moment, logits[target])

    def step(_, piece):
        h, target = piece
        return None, each_row(of_row, (raw_logits(h, lm_head), target))

    _, results = jax.lax.scan(step, None, _pieces((hidden, targets), chunk))
    return tuple(x.reshape(-1)[: len(hidden)] for x in results)


def backward(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    banned: Bool[Array, "V"] | None,
    temperature: float,
    rows: Float[Array, "5 N"],
    *,
    chunk: int,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Returns the gradients. `rows`: the last three of `forward`, and the gradients of the first two."""
    ids = jnp.arange(lm_head.shape[0])

    def step(d_head, piece):
        h, target, entropy, top, log_total, g_lp, g_h = piece
        log_p = token_logits(h, lm_head, temperature, banned) - top[:, None] - log_total[:, None]
        p = jnp.exp(log_p)
        surprise = jnp.where(p > 0, log_p, 0.0) + entropy[:, None]
        d_logits = g_lp[:, None] * ((ids == target[:, None]) - p) - g_h[:, None] * p * surprise
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(hidden, lm_head))
        d_h = einsum("NV,VD->ND", d_logits, lm_head)
        d_head = d_head + einsum("NV,ND->VD", d_logits, h)
        return d_head, d_h.astype(hidden.dtype)

    start = jnp.zeros(lm_head.shape, jnp.float32)
    d_head, d_hidden = jax.lax.scan(step, start, _pieces((hidden, targets, *rows), chunk))
    return d_hidden.reshape(-1, hidden.shape[1])[: len(hidden)], d_head.astype(lm_head.dtype)


def _pieces(arrays, chunk: int):
    """Returns arrays of N tokens as [pieces, chunk, ...]; zeros fill the last piece."""
    count = len(arrays[0])
    chunk = min(chunk, max(count, 1))
    padded = (jnp.pad(x, ((0, -count % chunk), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in padded)
