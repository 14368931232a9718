"""Which segments, and which leaves of those that are trees, stand in which row of a batch.

A segment of n leaves may be cut into runs of neighbouring leaves; what the leaves of both share is then computed twice. Rows
are filled one after the other: with the largest segment left, then with what wastes least, room and tokens computed twice.
(Minimum bin slack, Gupta and Ho 1999, for things that can be cut.)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

_NEVER = np.iinfo(np.int64).max


class Part(NamedTuple):
    """The leaves `start` to `stop - 1` of a segment."""

    segment: int
    start: int
    stop: int


def plan_rows(
    sizes: Sequence[Int[np.ndarray, "N N"]], patches: Sequence[int], rows: Iterable[tuple[int, int]]
) -> list[list[Part]] | None:
    """Returns what stands in each row, every leaf once; deterministic. None if these rows were not enough.

    Args:
      sizes: of each segment, for n leaves [n + 1, n + 1]: at [a, b], the tokens of the leaves a to b - 1 as one segment;
        0 where b <= a.
      patches: of each segment, whatever is cut off it.
      rows: tokens and patches that each holds, the largest first; only as many are taken as are needed.
    """
    left = _Left(sizes, np.asarray(patches))
    plan: list[list[Part]] = []
    for tokens, limit in rows:
        if not left.whole.any() or not (parts := left.fill(tokens, limit)):
            break
        plan.append(parts)
    return None if left.whole.any() else plan


def fullest(sizes: Sequence[int], limit: int) -> list[int]:
    """Returns the indices of those that together come nearest to `limit` and do not exceed it; rather the first ones."""
    reached = [1]  # bit n: some of the first ones together are n
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & ((2 << limit) - 1))
    total, chosen = reached[-1].bit_length() - 1, []
    for index in reversed(range(len(sizes))):
        if not reached[index] >> total & 1:
            chosen.append(index)
            total -= sizes[index]
    return chosen


class _Left:
    """What has no row yet: one run of leaves of each segment, of which a row may get the first ones or the last ones."""

    def __init__(self, sizes: Sequence[Int[np.ndarray, "N N"]], patches: Int[np.ndarray, "S"]):
        self.sizes, self.patches = sizes, patches
        self.runs = [(0, len(size) - 1) for size in sizes]
        self.most = max(stop for _, stop in self.runs)
        shape = len(sizes), 2 * self.most
        self.whole = np.zeros(len(sizes), np.int64)  # tokens of the run
        # Of the first 1, 2, ... leaves of a run, then of the last: their tokens, and those that the rest has once more.
        self.tokens, self.twice = np.full(shape, _NEVER), np.zeros(shape, np.int64)
        for segment in range(len(sizes)):
            self._measure(segment)

    def fill(self, tokens: int, patches: int) -> list[Part]:
        """Returns and takes what a row gets that holds so much."""
        parts: list[Part] = []
        while tokens and (chosen := self._together(tokens, patches) if parts else self._largest(tokens, patches)):
            for segment, choice in chosen:
                part = self._take(segment, choice)
                tokens -= int(self.sizes[segment][part.start, part.stop])
                patches -= int(self.patches[segment])
                parts.append(part)
        return parts

    def _waste(self, tokens: int, patches: int) -> Int[np.ndarray, "S C"]:
        fits = (self.tokens <= tokens) & (self.patches <= patches)[:, None]
        return np.where(fits, tokens - self.tokens + self.twice, _NEVER)

    def _largest(self, tokens: int, patches: int) -> list[tuple[int, int]]:
        """Returns the largest run, whole or what of it is best, or what is best of another one where nothing of it fits."""
        waste = self._waste(tokens, patches)
        share = np.maximum(self.whole / tokens, self.patches / max(patches, 1))
        segment = int(np.argmax(np.where(self.whole > 0, share, 0.0)))
        if waste[segment].min() == _NEVER:
            segment = int(np.argmin(waste.min(axis=1)))
        choice = int(np.argmin(waste[segment]))
        return [(segment, choice)] if waste[segment, choice] < _NEVER else []

    def _together(self, tokens: int, patches: int) -> list[tuple[int, int]]:
        """Returns the whole runs that fill the row best, or the part of one if that wastes less; nothing if all is waste."""
        waste = self._waste(tokens, patches)
        segment, choice = divmod(int(np.argmin(waste)), waste.shape[1])
        fitting = np.flatnonzero((self.whole > 0) & (self.whole <= tokens) & (self.patches <= patches))
        fitting = fitting[np.argsort(-self.whole[fitting], kind="stable")]
        several = fitting[fullest(self.whole[fitting].tolist(), tokens)]
        room = tokens - int(self.whole[several].sum())
        if len(several) and room <= waste[segment, choice] and self.patches[several].sum() <= patches:
            return [(int(s), self.runs[s][1] - self.runs[s][0] - 1) for s in several]
        return [(segment, choice)] if waste[segment, choice] < tokens else []

    def _take(self, segment: int, choice: int) -> Part:
        (start, stop), last = self.runs[segment], choice - self.most + 1
        middle = start + choice + 1 if last <= 0 else stop - last
        part, self.runs[segment] = ((start, middle), (middle, stop)) if last <= 0 else ((middle, stop), (start, middle))
        self._measure(segment)
        return Part(segment, *part)

    def _measure(self, segment: int) -> None:
        (start, stop), size, n = self.runs[segment], self.sizes[segment], self.most
        self.tokens[segment], self.whole[segment] = _NEVER, size[start, stop]
        if (count := stop - start) == 0:
            return
        first, rest = size[start, start + 1 : stop + 1], size[start + 1 : stop, stop]
        twice = first[:-1] + rest - size[start, stop]
        self.tokens[segment, :count], self.twice[segment, :count] = first, [*twice, 0]
        self.tokens[segment, n : n + count - 1], self.twice[segment, n : n + count - 1] = rest[::-1], twice[::-1]
