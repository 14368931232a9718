"""One sampler out of those of all processes: each draws its share, each gets everything."""

import contextlib
from collections.abc import Sequence

from ares_jax.errors import BrokenOffError, Preempted
from ares_jax.lifecycle import preemption
from ares_jax.lifecycle.watchdog import feed
from ares_jax.parallel.distributed import gather, interleaved, share
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.sampler import OnTree, Sampler, ignore


class GatheringSampler:
    """Wraps this process's sampler. Every process asks the same requests, together."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler

    def rollouts(self, requests: Sequence[RolloutRequest], on_group: OnTree = ignore) -> list[RolloutTree]:
        """Returns the groups in the order of `requests`; `on_group` is told of this process's own.

        Raises `Preempted`, in all processes, if one was told to go meanwhile.
        """
        places, mine = share(range(len(requests))), None

        def arrived(index: int, group: RolloutTree) -> None:
            feed()
            on_group(places[index], group)

        with preemption.held(), preemption.breaking_off(self._sampler.break_off), contextlib.suppress(BrokenOffError):
            mine = self._sampler.rollouts(share(requests), on_group=arrived)
        parts = gather(mine)
        if any(part is None for part in parts):
            raise Preempted(preemption.ON_DISK)
        return interleaved(parts)  # type: ignore[arg-type]
