"""One optimizer update from many packed micro-batches: accumulate gradients, then apply them, both jitted."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]
LossFn = Callable[[Params, Batch], tuple[Float[Array, ""], dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """What an update changes. `params` is flat: dotted name -> array."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    skipped: Int[Array, ""]  # updates left out because a gradient was not finite


def initial_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    # Two counters, two buffers: a donated buffer must not be given twice.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params), jnp.zeros((), jnp.int32))


class Update:
    """`update(state, micro_batches)`: sums the gradients of `loss` over the micro-batches and applies them.

    `loss(params, batch) -> (value, metrics)` must be normalised by the caller over the whole update, so that the
    sum over micro-batches *is* the loss of the batch; `metrics` are sums too. A gradient that is not finite leaves the
    state as it was, except `skipped`.
    """

    def __init__(self, loss: LossFn, optimizer: optax.GradientTransformation):
        def first(params, batch):
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
            return grads, {"loss": value, **metrics}

        def more(total, params, batch):
            return jax.tree.map(jnp.add, total, first(params, batch))

        def apply(state, grads):
            norm = optax.global_norm(grads)
            finite = jnp.isfinite(norm)
            updates, moments = optimizer.update(grads, state.optimizer, state.params)
            changed = TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments, state.skipped)
            kept = TrainState(state.step + 1, state.params, state.optimizer, state.skipped + 1)
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept), norm

        self._first = jax.jit(first)
        self._more = jax.jit(more, donate_argnums=0)
        self._apply = jax.jit(apply, donate_argnums=0)

    def __call__(self, state: TrainState, micro_batches: Iterable[Batch]) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the new state and the summed metrics, with `loss`, `grad_norm` (before clipping) and `skipped`."""
        total = None
        for batch in micro_batches:
            if total is None:
                total = self._first(state.params, batch)
            else:
                total = self._more(total, state.params, batch)
        if total is None:
            raise ValueError("an update needs at least one micro-batch")
        grads, metrics = total
        state, norm = self._apply(state, grads)
        return state, {**metrics, "grad_norm": norm, "skipped": state.skipped}
