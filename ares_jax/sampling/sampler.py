"""What a learner asks of a sampler, wherever it is: in a service (`service.client`) or in its own process (`local`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree

NamedArrays = Mapping[str, jax.Array | np.ndarray] | Iterable[tuple[str, jax.Array]]
OnTree = Callable[[int, RolloutTree], None]


def named(params: NamedArrays) -> Iterable[tuple[str, jax.Array | np.ndarray]]:
    """Returns name and array of each parameter, one at a time: converted copies need not all be there at once."""
    return params.items() if isinstance(params, Mapping) else params


def ignore(index: int, tree: RolloutTree) -> None:
    """Does nothing with a tree that has arrived."""


class Sampler(Protocol):
    """Every process of a run has one."""

    def rollouts(self, requests: Sequence[RolloutRequest], on_group: OnTree = ignore) -> list[RolloutTree]:
        """Returns the trees in the order of `requests`; `on_group(index, tree)` is told of each as it arrives.

        Raises `BrokenOffError` after `break_off`.
        """

    def push_weights(self, params: NamedArrays, version: int) -> None:
        """Gives it copies of new weights, laid out over the learner's devices; every process calls it together.

        Copies: the learner's next update donates its buffers.
        """

    def break_off(self) -> None:
        """Ends `rollouts`, and lets none begin any more. From any thread."""
