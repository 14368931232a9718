"""Window entropy: means of token entropies over w tokens, for whole trajectories and inside the decode step.

Forward-looking (the paper's appendix D): the mean at t is over t .. t + w - 1. In sampling a window is complete only
w - 1 tokens after its start, so a ring of the last w entropies gives, at step s, the mean of the window that began at
s - w + 1. All forms add the w entropies in the same order, so that they agree bit for bit, compiled or not.
`implementation` is as in `sample_with_entropy`; None: "xla".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import window_pallas
from kernels.implementations import chosen


def window_means(
    entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], window: int, *, implementation: str | None = None
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the forward-looking means (0 where there is none) and where a window is complete.

    A window is complete iff its `window` positions all lie inside `mask`.
    """
    _check(window)
    name, interpret = chosen(implementation)
    length = entropy.shape[1]
    if window > length:
        return jnp.zeros_like(entropy), jnp.zeros(entropy.shape, bool)
    if name != "xla":
        return window_pallas.means(entropy, mask, window, name=name, interpret=interpret)
    starts = length - window + 1
    entropy = jnp.where(mask, entropy, 0.0)  # a NaN outside the mask must not reach a mean
    total, complete = entropy[:, :starts], mask[:, :starts]
    for offset in range(1, window):
        total = total + entropy[:, offset : offset + starts]
        complete = complete & mask[:, offset : offset + starts]
    after = ((0, 0), (0, window - 1))
    return jnp.pad(jnp.where(complete, _mean(total, window), 0.0), after), jnp.pad(complete, after)


class WindowRing(NamedTuple):
    """The last entropies of every sequence, oldest first, and how many it has seen."""

    entropies: Float[Array, "B W"]
    seen: Int[Array, "B"]


def window_ring_init(batch: int, window: int) -> WindowRing:
    """Returns an empty ring for each of `batch` sequences."""
    _check(window)
    return WindowRing(jnp.zeros((batch, window), jnp.float32), jnp.zeros(batch, jnp.int32))


def window_push(
    ring: WindowRing, entropy: Float[Array, "B"], active: Bool[Array, "B"]
) -> tuple[WindowRing, Float[Array, "B"], Bool[Array, "B"]]:
    """Appends one entropy to every active sequence; the others stay as they are.

    Returns the ring, the mean of the window that ends here (0 if there is none) and whether it is complete: with s the
    number of tokens pushed before, what `window_means` gives at s - w + 1 of the pushed tokens.
    """
    window = ring.entropies.shape[1]
    entropies = jnp.where(
        active[:, None], jnp.concatenate([ring.entropies[:, 1:], entropy[:, None]], axis=1), ring.entropies
    )
    seen = ring.seen + active
    total = entropies[:, 0]
    for offset in range(1, window):
        total = total + entropies[:, offset]
    complete = active & (seen >= window)
    return WindowRing(entropies, seen), jnp.where(complete, _mean(total, window), 0.0), complete


def window_step(
    ring: WindowRing,
    tokens: Int[Array, "B W"],
    entropy: Float[Array, "B"],
    token: Int[Array, "B"],
    active: Bool[Array, "B"],
    *,
    tau_high: Float[Array, "B"],
    trigger: Bool[Array, "V"],
    implementation: str | None = None,
) -> tuple[WindowRing, Int[Array, "B W"], Float[Array, "B"], Bool[Array, "B"]]:
    """`window_push` of a drawn token and its entropy, and the test of the window that ends there.

    Returns the ring, the ring's tokens, the mean (0 if no window is complete), and whether it is a hit: the window is
    complete, its mean is at least `tau_high` nats, and it starts with a `trigger` token.
    """
    name, interpret = chosen(implementation)
    if name != "xla":
        window = tokens.shape[1]
        seen = ring.seen + active
        starts = trigger[tokens[:, 1] if window > 1 else token]
        entropies, tokens, mean, hit = window_pallas.step(
            ring.entropies, tokens, entropy, token, active, seen >= window, starts, tau_high, name=name, interpret=interpret
        )
        return WindowRing(entropies, seen), tokens, mean, hit
    ring, mean, complete = window_push(ring, entropy, active)
    tokens = jnp.where(active[:, None], jnp.concatenate([tokens[:, 1:], token[:, None]], axis=1), tokens)
    return ring, tokens, mean, complete & (mean >= tau_high) & trigger[tokens[:, 0]]


def _mean(total, window: int):
    # Not a division: by a constant, the compiler makes it this product; by an argument, when not compiled, it does not.
    return total * jnp.float32(1 / window)


def _check(window: int) -> None:
    if window < 1:
        raise ValueError(f"window={window}: an entropy window has at least 1 token")
