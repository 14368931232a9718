"""How many pages groups will take until they end, learned from those that have: to admit more is to preempt."""

from collections.abc import Iterable

from ares_jax.sampling.growing_tree import Group
from ares_jax.sampling.options import EngineOptions
from ares_jax.sampling.requests import RolloutRequest

_MEMORY = 64  # groups over which the mean runs


class PageForecast:
    """Expects of a leaf as many pages of its own as those before had on average."""

    def __init__(self, options: EngineOptions):
        self._options = options
        self._leaf_pages, self._groups = 0.0, 0

    def learn(self, group: Group) -> None:
        """Takes a finished group, while it has its pages, into the mean."""
        self._groups += 1
        own = (group.pages_held(self._options.page_size) - len(group.prompt_pages)) / len(group.leaves)
        self._leaf_pages += (own - self._leaf_pages) / min(self._groups, _MEMORY)

    def expected(self, request: RolloutRequest) -> int:
        """Returns the pages that a group takes until its end."""
        return self._options.pages(len(request.token_ids)) + round(request.group_size * self._leaf_pages)

    def claimed(self, groups: Iterable[Group]) -> int:
        """Returns the pages that admitted groups will still ask for: given away, they would cost a preemption."""
        size = self._options.page_size
        return sum(max(0, self.expected(group.request) - group.pages_held(size)) for group in groups)
