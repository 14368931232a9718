"""The answers of an evaluation in progress, on disk as they come: the next attempt asks for the rest alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from ares_jax.lifecycle.preemption import from_first
from ares_jax.metrics import read_jsonl, write_atomic


class AnswersSoFar:
    """Each process appends to a file of its own, `<name>.<process>.jsonl`; all know what all wrote. Made together.

    A line: {"index": of the problem, "response", "tokens", "asked"}. Lines with another `asked` are dropped.
    """

    def __init__(self, folder: Path, name: str, asked: Mapping[str, Any]):
        self._folder, self._name, self._asked = folder, name, json.loads(json.dumps(asked))
        self.known: dict[int, dict] = {line["index"]: line for line in from_first(self._collect)}

    def _collect(self) -> list[dict]:
        """Returns what earlier attempts wrote, and makes one file of it: they may have had another number of processes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [line for path in self._files() for line in read_jsonl(path) if line["asked"] == self._asked]
        write_atomic(mine := self._path(0), "".join(json.dumps(line) + "\n" for line in lines))
        for path in self._files() - {mine}:
            path.unlink()
        return lines

    def __enter__(self) -> Self:
        self._file = self._path(jax.process_index()).open("a")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def keep(self, index: int, response: str, tokens: int) -> None:
        """Notes an answer that this process got."""
        self._file.write(json.dumps({"index": index, "response": response, "tokens": tokens, "asked": self._asked}) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Removes the files: the result is written."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _path(self, process: int) -> Path:
        return self._folder / f"{self._name}.{process}.jsonl"

    def _files(self) -> set[Path]:
        return set(self._folder.glob(f"{self._name}.*.jsonl"))
