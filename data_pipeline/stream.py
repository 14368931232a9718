"""An endless, deterministic, resumable stream of problems, its own share in each process, read ahead (grain)."""

from collections.abc import Callable
from typing import Any

import grain
from absl import flags

from data_pipeline.reading import Ledger, Reader
from data_pipeline.sources.mixture import Mixture, Source


class Stream:
    """Iterates over `transform(problem)`; with `batch_size`, over lists of so many.

    Order: every source is shuffled anew each epoch; a weighted mixture draws from its sources in turn, in their shares. It
    depends on `seed` alone, neither on workers nor on what is read ahead. Process i of n takes elements i, i+n, ... of each
    source's one endless order, so that all processes together read every problem once an epoch.

    State: the number of elements taken. It resumes anywhere, with any number of workers.

    Problems that raise `DataError` are left out, as `Ledger` allows.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Any],
        *,
        seed: int,
        batch_size: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
        prefetch: int = 32,
        max_corrupt_share: float = 0.0,
    ):
        """`workers`: processes that read and transform; 0: threads of this process. `prefetch`: elements read ahead."""
        order = _order(source, seed, process_index, process_count)
        self._dataset = order.map(Reader(source, transform))
        self._batch_size, self._workers, self._prefetch = batch_size, workers, prefetch
        self.ledger = Ledger(len(source), max_corrupt_share)
        self._position = 0
        self._elements: grain.DatasetIterator | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        if self._batch_size is None:
            return self._next()
        return [self._next() for _ in range(self._batch_size)]

    def get_state(self) -> dict[str, int]:
        """Returns what `set_state` needs (JSON) to go on after the last element returned."""
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Ends the worker processes and threads; the next element starts new ones."""
        if self._elements is not None:
            self._elements.close()
            self._elements = None

    def _next(self) -> Any:
        if self._elements is None:
            self._elements = self._start()
        while True:
            element = next(self._elements)
            self._position += 1
            if self.ledger.admits(element):
                return element

    def _start(self) -> grain.DatasetIterator:
        rest = self._dataset[self._position :]
        if not self._workers:
            return iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=self._prefetch)))
        if not flags.FLAGS.is_parsed():  # grain reads its own flags on the way to a worker
            flags.FLAGS.mark_as_parsed()
        each = max(1, self._prefetch // self._workers)
        dataset = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=each)
        return iter(dataset.mp_prefetch(options))


def _order(source: Source, seed: int, process_index: int, process_count: int) -> grain.MapDataset:
    """Returns the endless order of indices of one process."""
    shares = source.shares if isinstance(source, Mixture) else [(range(len(source)), 1.0)]
    parts = [
        grain.MapDataset.range(part.start, part.stop)
        .seed(seed + number)
        .shuffle()
        .repeat(None)[process_index::process_count]
        for number, (part, _) in enumerate(shares)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [weight for _, weight in shares])
