"""AdamW with gradient clipping, a learning-rate schedule and, for parameters stored narrow, float32 master copies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ares_jax.models.lora import is_lora


def trainable(optimizer: ConfigDict, *, lora: bool = False) -> Callable[[str], bool]:
    """Returns which parameters, by name, are trained: LoRA's alone, or the model's own as `config.optimizer` says."""
    if lora:
        return is_lora
    return lambda name: not is_lora(name) and not (optimizer.freeze_vision and name.startswith("visual."))


def make_schedule(learning_rate: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 1.0) -> optax.Schedule:
    """Returns the learning rate by the number of updates made before.

    Args:
      learning_rate: of the plateau; reached after `warmup_steps`, then a cosine down to `final_fraction` of it.
      steps: updates in all.
    """
    if final_fraction == 1.0:
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1), alpha=final_fraction)
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after


def make_optimizer(
    optimizer: ConfigDict, *, learning_rate: float, steps: int, warmup_steps: int = 0, final_fraction: float = 1.0
) -> optax.GradientTransformation:
    """Returns AdamW as `config.optimizer` says, on float32 copies of parameters that are stored in fewer bits.

    Args:
      optimizer: the section `optimizer` of the config.
      learning_rate, steps, warmup_steps, final_fraction: as in `make_schedule`.
    """
    schedule = make_schedule(learning_rate, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)

    def decayed(params):  # matrices only, neither biases nor norm gains; a stacked layer adds one axis to each
        return {name: leaf.ndim >= (3 if ".layers." in name else 2) for name, leaf in params.items()}

    adamw = optax.adamw(
        schedule, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps, weight_decay=optimizer.weight_decay,
        mask=decayed, mu_dtype=optimizer.mu_dtype,
    )  # fmt: skip
    return with_masters(optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw))


def with_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `optimizer` on float32 copies of those parameters (a flat dict) that are stored in fewer bits.

    A step of 1e-6 is lost on a bfloat16 weight of 1e-2; its copy collects them, and the weight is always the rounded copy.
    Moments are the copies', so float32. The state is (copies, state of `optimizer`); the latter alone where all parameters
    are wide already.
    """

    def init(params):
        masters = _masters(params)
        inner = optimizer.init({**params, **masters})
        return (masters, inner) if masters else inner

    def update(grads, state, params):
        if not _narrow(params):
            return optimizer.update(grads, state, params)
        masters, inner = state
        wide = {**params, **masters}
        updates, inner = optimizer.update(grads, inner, wide)
        new = optax.apply_updates(wide, updates)
        # As an update, since optax wants one: the difference to the rounded copy.
        steps = {name: new[name].astype(params[name].dtype).astype(jnp.float32) - params[name] for name in masters}
        return {**updates, **steps}, ({name: new[name] for name in masters}, inner)

    return optax.GradientTransformation(init, update)


def _narrow(params) -> set[str]:
    return {name for name, value in params.items() if value.dtype.itemsize < 4}


def _masters(params) -> dict[str, jax.Array]:
    return {name: params[name].astype(jnp.float32) for name in sorted(_narrow(params))}
