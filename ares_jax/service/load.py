"""What the requests that wait hold, together: places, and bytes of images and pixel patches."""

import collections
import contextlib
from collections.abc import Iterator

from ares_jax.service.chat import RefusedError


class Load:
    """Chats and rollouts share the bytes; each has its own places."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self._bytes = max_bytes, 0
        self._places: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def places(self, kind: str, count: int, *, limit: int, status: int) -> Iterator["Held"]:
        """Yields places for `count` of a kind, of `limit`, that as yet hold no bytes.

        Raises `RefusedError` with this status if there are not so many left.
        """
        if self._places[kind] + count > limit:
            raise RefusedError(status, f"{self._places[kind]} {kind} wait already; ask again later")
        self._places[kind] += count
        held = Held(self)
        try:
            yield held
        finally:
            self._places[kind] -= count
            self._bytes -= held.bytes

    def change(self, by: int) -> None:
        """Raises `RefusedError` with 429 if that is too much together with what others hold."""
        if by > 0 and self._bytes + by > self.max_bytes:
            raise RefusedError(429, f"the requests that wait hold {self._bytes} bytes already; ask again later")
        self._bytes += by


class Held:
    """What one request holds."""

    def __init__(self, load: Load):
        self._load, self.bytes = load, 0

    def take(self, size: int) -> None:
        """Holds `size` bytes in place of what it held."""
        self._load.change(size - self.bytes)
        self.bytes = size
