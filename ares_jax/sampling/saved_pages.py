"""A group's pages in the host's memory for as long as it has none in the cache.

To compute them again from its tokens would round differently: the same seed would give other trees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ares_jax.sampling.growing_tree import Group
from ares_jax.sampling.pages import PagePool

Content = Float[np.ndarray, "L C S 2K H"]  # pages, padded to a compiled number


@dataclass(frozen=True)
class Saved:
    """A preempted group."""

    group: Group
    content: Content
    places: list[list[int]]  # for each of the group's page lists: where in `content` its pages are
    pages: int  # different ones

    def restore(self, pool: PagePool, write: Callable[[list[int], Content], None]) -> None:
        """Gives the group pages again, shared as they were. Raises `OutOfPages`."""
        pages = pool.allocate(self.pages)
        write(pages, self.content)
        for held, places in zip(self.group.page_lists(), self.places, strict=True):
            held[:] = pool.share([pages[place] for place in places])
        pool.release(pages)


def save(group: Group, read: Callable[[list[int]], Content]) -> Saved:
    """Returns what `read` finds in the group's pages, each once; to release them is the caller's."""
    place = {page: i for i, page in enumerate(dict.fromkeys(p for pages in group.page_lists() for p in pages))}
    places = [[place[page] for page in pages] for pages in group.page_lists()]
    return Saved(group, read(list(place)), places, len(place))
