"""A model's parameters as a flat dictionary, dotted name -> array: the form in which they are saved, sent and updated."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ares_jax.errors import UserError

Model = TypeVar("Model", bound=nnx.Module)
Params = dict[str, jax.Array]  # flat


def to_flat(model: nnx.Module) -> dict[str, Any]:
    """Returns every parameter (array, or shape of an abstract model) by its dotted name, such as `text.layers.q_kernel`."""
    return {_name(path): param.get_value() for path, param in _params(model)}


def narrower(*types: jnp.dtype) -> jnp.dtype:
    """Returns the type of the fewest bits: weights stored wider than the arithmetic are rounded before any use."""
    return min(types, key=lambda dtype: jnp.dtype(dtype).itemsize)


def with_params(model: Model, flat: Mapping[str, Any]) -> Model:
    """Returns a model like `model` (which may be abstract) that holds the given arrays. Pure: usable under `jit`.

    Raises:
      UserError: a name is missing or unknown, or a shape differs; the first offender is named.
    """
    graphdef, state = nnx.split(model)
    check_flat(to_flat(model), flat)
    leaves = {path: param.replace(flat[_name(path)]) for path, param in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def check_flat(expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the first parameter by which `given` does not fit `expected`."""
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        kind, name = ("is missing", missing[0]) if missing else ("is unknown", unknown[0])
        raise UserError(
            f"parameter {name} {kind} ({len(missing)} missing, {len(unknown)} unknown); are these weights of this model?"
        )
    for name, value in expected.items():
        if tuple(value.shape) != tuple(given[name].shape):
            raise UserError(
                f"parameter {name} has shape {tuple(given[name].shape)}, the model's is {tuple(value.shape)}; "
                "check the model section of the config"
            )


def logical_axes(model: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axis names of every parameter."""
    return {_name(path): param.get_metadata("logical_axes") for path, param in _params(model)}


def count_parameters(flat: Mapping[str, jax.Array]) -> int:
    """Returns the number of scalars."""
    return sum(value.size for value in flat.values())


def _params(model: nnx.Module):
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
