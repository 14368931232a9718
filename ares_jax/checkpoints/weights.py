"""A model's weights as Hugging Face's tensors, wherever they are stored: all checked at first, then read one by one."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ares_jax.checkpoints.names import EMBEDDING, HEAD, new_layout, slots
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from ares_jax.params import to_flat

WORKERS = 4  # threads that move tensors, as long as the budget of bytes lasts


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor without reading it. `file` is the shard it came from, if it came from one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Budget:
    """So many bytes may be in flight at once: small tensors travel together, the largest alone."""

    def __init__(self, limit: int):
        self._free, self._limit, self._changed = limit, limit, threading.Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Waits until `nbytes` are free, and holds them."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


class Weights(ABC):
    """Tensors by the names their checkpoint gives them (either layout). `read` may be called from several threads.

    Attributes:
      entries: every tensor, in the order of the checkpoint.
      slots: where each lives in our parameters; a tied head that is stored besides shares the embedding's place.
      index_metadata: `metadata` of the index of shards they came with, if they did.
    """

    def __init__(
        self,
        where: str,
        config: Qwen25VLConfig,
        entries: Mapping[str, Entry],
        index_metadata: dict[str, Any] | None = None,
    ):
        """Raises `UserError` that names the first tensor which is missing, unknown, doubled or of the wrong shape."""
        self.where, self.config, self.index_metadata = where, config, index_metadata
        table = slots(config)
        optional = {HEAD: table[EMBEDDING]} if config.tie_word_embeddings else {}
        self.by_new_name: dict[str, str] = {}
        for name in entries:
            if (other := self.by_new_name.setdefault(new_layout(name), name)) != name:
                raise UserError(f"{where}: {other} and {name} are the same tensor; remove the file that holds one of them")
        if missing := [name for name in table if name not in self.by_new_name]:
            raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} are); the checkpoint is incomplete")
        if unknown := sorted(set(self.by_new_name) - set(table) - set(optional)):
            raise UserError(f"{where}: {len(unknown)} tensors do not belong to Qwen2.5-VL, the first is {unknown[0]}")
        self.slots = {name: {**table, **optional}[new] for new, name in self.by_new_name.items()}
        self.entries = {name: entries[name] for name in self.slots}
        for name, slot in self.slots.items():
            if (shape := tuple(entries[name].shape)) != slot.shape:
                raise UserError(f"{where}: tensor {name} has shape {shape} here, config.json says {slot.shape}")

    def budget(self) -> Budget:
        """Returns one of the largest tensor's size."""
        return Budget(max(entry.nbytes for entry in self.entries.values()))

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, contiguous, as `entries[name]` describes it. Raises `UserError` if it is damaged."""

    def read_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Returns a tensor in another type, as `read` does."""
        return self.read(name).astype(dtype, copy=False)


class ModelWeights(Weights):
    """The weights of a model in memory."""

    def __init__(self, model: Qwen25VL):
        self._flat: dict[str, jax.Array] = to_flat(model)
        entries = {
            name: Entry(slot.shape, np.dtype(self._flat[slot.ours].dtype)) for name, slot in slots(model.config).items()
        }
        super().__init__("model", model.config, entries)

    def read(self, name: str) -> np.ndarray:
        slot = self.slots[name]
        value = self._flat[slot.ours]
        return slot.to_theirs(np.asarray(value if slot.layer is None else value[slot.layer]))


class Cast(Weights):
    """The same tensors stored in another type: rounded to the nearest number of it where it is narrower."""

    def __init__(self, weights: Weights, dtype: np.dtype):
        self._weights, self.dtype = weights, dtype
        entries = {name: replace(entry, dtype=dtype) for name, entry in weights.entries.items()}
        # Without the metadata of the old shards: they hold the size.
        super().__init__(weights.where, weights.config, entries)

    def budget(self) -> Budget:
        return self._weights.budget()

    def read(self, name: str) -> np.ndarray:
        return self._weights.read_as(name, self.dtype)
