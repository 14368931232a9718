"""Reference counts of the cache's pages. Page 0 is trash: never given out, written to by rows that are done."""

from collections.abc import Sequence

import numpy as np


class OutOfPages(Exception):
    """No free page is left; the caller preempts."""


class PagePool:
    """Pages are shared by counting references; only a page with one reference may be written to."""

    def __init__(self, num_pages: int):
        self._references = np.zeros(num_pages, np.int32)
        self._references[0] = 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return int(self._references[page])

    def allocate(self, count: int) -> list[int]:
        """Returns `count` fresh pages, all or none. Raises `OutOfPages`."""
        if count > len(self._free):
            raise OutOfPages
        pages = [self._free.pop() for _ in range(count)]
        self._references[pages] = 1
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """Counts one more reference to each page and returns them."""
        for page in pages:
            if page == 0 or self._references[page] == 0:
                raise ValueError(f"page {page} is not in use and cannot be shared")
            self._references[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page; a page without any is free again."""
        for page in pages:
            if page == 0 or self._references[page] == 0:
                raise ValueError(f"page {page} is released twice")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
