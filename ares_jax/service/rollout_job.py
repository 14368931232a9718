"""One call of `RolloutClient.rollouts`: portions of its requests, who works on them, what has arrived."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.service.connection import Connection

_CHUNK = 64  # groups a request carries, at most: small enough to spread, large enough to fill an engine
_CHUNK_BYTES = 64 * 2**20  # of pixels a request carries, at most, unless a single group has more
_SLOW = 3.0  # times as long as the slowest request that has been answered whole: then idle samplers are asked too


@dataclass(eq=False)
class _Asked:
    """A chunk that a sampler works on."""

    sampler: "Connection"
    chunk: list[int]
    since: float
    again: bool  # it was asked of another before, or is by now


class RolloutJob:
    """One call of `rollouts`: what its threads share."""

    def __init__(self, requests: Sequence[RolloutRequest], on_group, chunks: list[list[int]]):
        self.requests, self._on_group, self._chunks = requests, on_group, chunks
        self.groups: dict[int, RolloutTree] = {}
        self.failure: BaseException | None = None
        self.changed = threading.Condition()
        self._asked: list[_Asked] = []
        self._longest = math.inf  # seconds a request took that was answered whole

    @property
    def over(self) -> bool:
        return self.failure is not None or len(self.groups) == len(self.requests)

    def next_chunk(self, sampler: "Connection") -> list[int] | None:
        """Waits for work, which may come back from a sampler that was lost, or is slow. None: there is no more."""
        with self.changed:
            while not self.over:
                if self._chunks:
                    chunk, again = self._chunks.pop(), False
                elif slow := next((asked for asked in self._asked if self._is_slow(asked, sampler)), None):
                    slow.again = again = True
                    chunk = [index for index in slow.chunk if index not in self.groups]
                else:
                    self.changed.wait(timeout=0.2)
                    continue
                self._asked.append(_Asked(sampler, chunk, time.monotonic(), again))
                return chunk
            return None

    def _is_slow(self, asked: _Asked, idle: "Connection") -> bool:
        return not asked.again and asked.sampler is not idle and time.monotonic() - asked.since > _SLOW * self._longest

    def answered(self, sampler: "Connection", chunk: list[int]) -> None:
        """Notes that a sampler has delivered all of a chunk."""
        with self.changed:
            seconds = time.monotonic() - self._done(sampler, chunk).since
            self._longest = seconds if math.isinf(self._longest) else max(self._longest, seconds)

    def give_back(self, sampler: "Connection", chunk: list[int]) -> None:
        """Offers what is still missing of a chunk to the other threads, unless another sampler is asked for it too."""
        with self.changed:
            self._done(sampler, chunk)
            elsewhere = {index for asked in self._asked for index in asked.chunk}
            if missing := [index for index in chunk if index not in self.groups and index not in elsewhere]:
                self._chunks.append(missing)
                self.changed.notify_all()

    def _done(self, sampler: "Connection", chunk: list[int]) -> _Asked:
        place = next(i for i, asked in enumerate(self._asked) if asked.sampler is sampler and asked.chunk is chunk)
        return self._asked.pop(place)

    def take(self, index: int, group: RolloutTree) -> None:
        with self.changed:
            if index not in self.groups and not self.over:
                self._on_group(index, group)
                self.groups[index] = group
                if self.over:
                    self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


def portions(requests: Sequence[RolloutRequest], streams: int) -> list[list[int]]:
    """Returns the indices of `requests`, in portions to be taken from the end."""
    most = min(_CHUNK, -(-len(requests) // streams))
    chunks: list[list[int]] = []
    size = 0
    for index, request in enumerate(requests):
        size += request.patches.nbytes
        if not chunks or len(chunks[-1]) == most or size > _CHUNK_BYTES:
            chunks.append([])
            size = request.patches.nbytes
        chunks[-1].append(index)
    return chunks[::-1]
