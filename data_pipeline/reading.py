"""Reads problems and leaves the bad ones out: counted, named, and only so many."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from absl import logging

from data_pipeline.errors import DataError, OverlongError
from data_pipeline.sources.mixture import Source


@dataclass(frozen=True)
class Dropped:
    """Stands where a problem would. It travels like one, so that order and counts do not depend on worker processes."""

    index: int
    reason: str
    overlong: bool


@dataclass(frozen=True)
class Reader:
    """`reader(i)` is `transform(source[i])`, or `Dropped` where that raises `DataError`. Pickled to worker processes."""

    source: Source
    transform: Callable[[Any], Any]

    def __call__(self, index: int) -> Any:
        try:
            return self.transform(self.source[int(index)])
        except DataError as error:
            return Dropped(int(index), str(error), isinstance(error, OverlongError))


class Ledger:
    """Counts distinct dropped problems, and stops the run when they are too many."""

    def __init__(self, total: int, max_corrupt_share: float):
        """`total`: problems that will be read; more than this share of them corrupt is an error, at least one is none."""
        self._total, self._share = total, max_corrupt_share
        self._overlong: set[int] = set()
        self._corrupt: set[int] = set()

    @property
    def overlong(self) -> int:
        return len(self._overlong)

    @property
    def corrupt(self) -> int:
        return len(self._corrupt)

    def admits(self, element: Any) -> bool:
        """Returns whether `element` is a problem; if not, takes note.

        Raises:
          DataError: more are corrupt than allowed, or nothing is left.
        """
        if not isinstance(element, Dropped):
            return True
        if element.index in self._overlong or element.index in self._corrupt:
            return False
        (self._overlong if element.overlong else self._corrupt).add(element.index)
        if not element.overlong:
            if self.corrupt > self._share * self._total:
                raise DataError(
                    f"{element.reason} ({self.corrupt} corrupt of {self._total} problems; mend them, or raise "
                    f"data.max_corrupt_share={self._share:g})"
                )
            logging.warning("left out: %s", element.reason)
        elif self.overlong in (10**power for power in range(10)):
            logging.warning("left out as too long, %d so far, the last: %s", self.overlong, element.reason)
        if self.overlong + self.corrupt >= self._total:
            raise DataError(
                f"none of {self._total} problems is left: {self.overlong} are too long, {self.corrupt} corrupt; "
                f"the last: {element.reason}"
            )
        return False


def read_all(reader: Reader, indices: Iterable[int], ledger: Ledger) -> Iterator[tuple[int, Any]]:
    """Yields index and result of all that can be read, in order."""
    for index in indices:
        element = reader(index)
        if ledger.admits(element):
            yield index, element
