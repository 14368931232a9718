"""The learner's form: log-probability of given tokens and entropy of their distributions, without the logits.

The backward pass is written by hand: with p the softmax of z, dz = g_lp (1[target] - p) - g_H p (log p + H), then divided
by the temperature. What it keeps of the forward pass is a row's entropy and log-sum-exp, in two parts; z is computed again.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import log_probs_gpu, log_probs_tpu, log_probs_xla
from kernels.implementations import chosen


@jax.named_scope("log_probs")
def token_log_probs_and_entropy(
    hidden: Float[Array, "N D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    *,
    temperature: float,
    banned: Bool[Array, "V"] | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Returns (log_prob [N], entropy [N]) in nats, float32, differentiable in `hidden` and `lm_head`.

    Args:
      hidden: hidden states that predict the targets.
      lm_head: output embedding.
      targets: the tokens. A banned target has log-probability -inf and takes no gradient.
      temperature: divides the logits.
      banned: tokens outside the distribution, as in `sample_with_entropy`.
      implementation: "xla": chunks of tokens with all their logits. "tpu" (Pallas; one device, so inside shard_map if there
        are more): tiles of tokens and vocabulary, forwards and backwards, no logits in memory. "gpu": tiles forwards,
        the chunks of "xla" backwards. "tpu_interpret", "gpu_interpret": the same in the interpreter, for tests. None: "xla",
        until a Pallas kernel has been timed on its device and won.
      chunk: tokens whose logits "xla" holds at one time; N need not be a multiple of it. None: as many as have at most
        `log_probs_xla.LOGITS` logits (0.6 GiB), and at most 1024, so that memory grows with neither N nor V.

    Besides its results the backward pass of "xla" holds the head's gradient in float32.
    """
    name, interpret = chosen(implementation)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: a log-probability needs one above 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1 token goes through at a time")
    chunk = chunk or log_probs_xla.chunk_of(lm_head.shape[0])
    return _statistics(hidden, lm_head, targets, banned, temperature, name, interpret, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _statistics(hidden, lm_head, targets, banned, temperature, name, interpret, chunk):
    return _forward(hidden, lm_head, targets, banned, temperature, name, interpret, chunk)[0]


def _forward(hidden, lm_head, targets, banned, temperature, name, interpret, chunk):
    forward = _passes(name, interpret, chunk)[0]
    log_prob, *sums = forward(hidden, lm_head, targets, banned, temperature)
    return (log_prob, sums[0]), (hidden, lm_head, targets, banned, *sums)


def _backward(temperature, name, interpret, chunk, residuals, cotangents):
    hidden, lm_head, targets, banned, *sums = residuals
    g_log_prob, g_entropy = cotangents
    if banned is not None:
        g_log_prob = jnp.where(banned[targets], 0.0, g_log_prob)
    rows = jnp.stack([*sums, g_log_prob, g_entropy])
    backward = _passes(name, interpret, chunk)[1]
    return *backward(hidden, lm_head, targets, banned, temperature, rows), None, None


def _passes(name, interpret, chunk):
    """Returns the forward and the backward pass of an implementation."""
    by_xla = {"chunk": chunk}
    if name == "xla":
        return functools.partial(log_probs_xla.forward, **by_xla), functools.partial(log_probs_xla.backward, **by_xla)
    kernels: ModuleType = {"tpu": log_probs_tpu, "gpu": log_probs_gpu}[name]
    forward = functools.partial(kernels.forward, interpret=interpret)
    if name == "gpu":
        return forward, functools.partial(log_probs_xla.backward, **by_xla)
    return forward, functools.partial(kernels.backward, interpret=interpret)


_statistics.defvjp(_forward, _backward)
