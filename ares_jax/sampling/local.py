"""The sampler inside the learner's process: one engine a host, behind the client's interface."""

from collections.abc import Sequence

from ares_jax.errors import BrokenOffError
from ares_jax.parallel.distributed import local_parts
from ares_jax.sampling.engine import Engine
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.sampler import NamedArrays, OnTree, ignore, named


class LocalSampler:
    """Draws with the engine of this process; weights go from device to device."""

    def __init__(self, engine: Engine):
        self._engine, self._broken_off = engine, False

    def push_weights(self, params: NamedArrays, version: int) -> None:
        """Takes a copy of the weights, wherever they lie; every process calls it together."""
        specs = self._engine.weight_specs()
        self._engine.load_weights(
            {name: local_parts(value, specs[name].sharding) for name, value in named(params)}, version
        )

    def rollouts(self, requests: Sequence[RolloutRequest], on_group: OnTree = ignore) -> list[RolloutTree]:
        """Returns the groups in the order of `requests`; `on_group(index, group)` is told of each as it is complete.

        Raises `BrokenOffError` after `break_off`.
        """
        place = {self._engine.submit(request): index for index, request in enumerate(requests)}
        groups: dict[int, RolloutTree] = {}
        while self._engine.busy:
            if self._broken_off:
                raise BrokenOffError
            for number, group in self._engine.step():
                groups[place[number]] = group
                on_group(place[number], group)
        return [groups[index] for index in range(len(requests))]

    def break_off(self) -> None:
        """Ends `rollouts`, between two steps of the engine, and lets none begin any more. From any thread."""
        self._broken_off = True
