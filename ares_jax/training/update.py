"""One optimizer update from many packed micro-batches: accumulate gradients, then apply them, both jitted."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ares_jax.parallel.sharding import Placement
from ares_jax.params import Params

Batch = dict[str, jax.Array]
Trainable = Callable[[str], bool]  # of the parameter with this name
Lower = Callable[[], jax.stages.Lowered]
LossFn = Callable[[Params, Batch], tuple[Float[Array, ""], dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """What an update changes. `params` is flat: dotted name -> array."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    skipped: Int[Array, ""]  # updates left out because a gradient was not finite


def everything(name: str) -> bool:
    """Trains every parameter."""
    return True


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, placement: Placement, trainable: Trainable = everything
) -> TrainState:
    """Returns the state before the first update; only trainable parameters have moments."""
    shape = abstract_state(params, optimizer, placement, trainable)._replace(params={})

    def rest(trained):  # two counters, two buffers: a donated buffer must not be given twice
        return TrainState(jnp.zeros((), jnp.int32), {}, optimizer.init(trained), jnp.zeros((), jnp.int32))

    made = jax.jit(rest, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shape))(_split(params, trainable)[0])
    return made._replace(params=params)


def abstract_state(
    params: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    placement: Placement,
    trainable: Trainable = everything,
) -> TrainState:
    """Returns the shapes and shardings of the state, for parameters that may be abstract."""
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    moments = jax.eval_shape(optimizer.init, _split(dict(params), trainable)[0])
    state: Any = (counter, dict(params), moments, counter)
    return placement.abstract(TrainState(*state))


class Update:
    """`update(state, micro_batches)`: sums the gradients of `loss` over the micro-batches and applies them.

    `loss(params, batch) -> (value, metrics)` must be normalised by the caller over the whole update, so that the
    sum over micro-batches *is* the loss of the batch; `metrics` are sums too. A gradient that is not finite leaves the
    state as it was, except `skipped`. Parameters that are not `trainable` have neither gradient nor moments.
    """

    def __init__(
        self, loss: LossFn, optimizer: optax.GradientTransformation, placement: Placement, trainable: Trainable = everything
    ):
        def first(params, batch):
            trained, fixed = _split(params, trainable)
            value_and_grad = jax.value_and_grad(lambda own: loss({**fixed, **own}, batch), has_aux=True)
            (value, metrics), grads = value_and_grad(trained)
            # In float32 also where the parameters are not: bfloat16 would lose small parts of the sum.
            wide = {name: g.astype(jnp.float32) for name, g in grads.items()}
            grads = {name: jax.lax.with_sharding_constraint(g, placement.params[name]) for name, g in wide.items()}
            return grads, {"loss": value, **metrics}

        def more(total, params, batch):
            return jax.tree.map(jnp.add, total, first(params, batch))

        @jax.named_scope("optimizer")
        def apply(state, grads):
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(norm)
            trained, fixed = _split(state.params, trainable)
            updates, moments = optimizer.update(grads, state.optimizer, trained)
            changed = optax.apply_updates(trained, updates), moments
            kept = trained, state.optimizer
            trained, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
            skipped = state.skipped + jnp.where(finite, 0, 1)
            params = {name: trained.get(name, fixed.get(name)) for name in state.params}
            return TrainState(state.step + 1, params, moments, skipped), norm

        self._placement = placement
        self._first = jax.jit(first)
        self._more = jax.jit(more, donate_argnums=0)
        self._apply = jax.jit(apply, donate_argnums=0)

    def lower(self, state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Lower]:
        """Returns what lowers the programs of an update: `first` and `more` micro-batches, `apply`; for placed shapes."""

        def total():
            return self._placement.abstract(jax.eval_shape(self._first, state.params, batch))

        return {
            "first": in_mesh(self._placement, lambda: self._first.lower(state.params, batch)),
            "more": in_mesh(self._placement, lambda: self._more.lower(total(), state.params, batch)),
            "apply": in_mesh(self._placement, lambda: self._apply.lower(state, total()[0])),
        }

    def __call__(self, state: TrainState, micro_batches: Iterable[Batch]) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the new state and the summed metrics, with `loss`, `grad_norm` (before clipping) and `skipped`."""
        total = None
        with jax.set_mesh(self._placement.mesh):
            for micro_batch in micro_batches:
                batch = self._placement.put_batch(micro_batch)
                total = self._more(total, state.params, batch) if total else self._first(state.params, batch)
            if total is None:
                raise ValueError("an update needs at least one micro-batch")
            grads, metrics = total
            state, norm = self._apply(state, grads)
        return state, {**metrics, "grad_norm": norm, "skipped": state.skipped}


def in_mesh(placement: Placement, lower: Lower) -> Lower:
    """Returns `lower` with the mesh of the placement in use."""

    def lowered():
        with jax.set_mesh(placement.mesh):
            return lower()

    return lowered


def _split(params: Params, trainable: Trainable) -> tuple[Params, Params]:
    trained = {name: value for name, value in params.items() if trainable(name)}
    return trained, {name: value for name, value in params.items() if name not in trained}
