"""Several sources as one: by size, or in given shares."""

from collections.abc import Sequence
from typing import Any, Protocol

from data_pipeline.sources.files import FileIndex


class Source(Protocol):
    """Random access to problems (or to anything that a transform takes)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Any: ...


class Mixture:
    """All problems of `sources`, one source after the other. `shares` says how often an iterator draws from each."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        self._sources = list(sources)
        self._index = FileIndex([len(source) for source in sources])
        self._weights = None if weights is None else list(weights)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Any:
        source, place = self._index.find(index)
        return self._sources[source][place]

    @property
    def shares(self) -> list[tuple[range, float]]:
        """Ranges of indices, each with its weight. Without weights there is one range: sources count by their size."""
        if self._weights is None:
            return [(range(len(self)), 1.0)]
        ranges, start = [], 0
        for source in self._sources:
            ranges.append(range(start, start + len(source)))
            start += len(source)
        return list(zip(ranges, self._weights, strict=True))
