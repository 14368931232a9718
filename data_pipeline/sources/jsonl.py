"""JSONL: one object a line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.files import FileIndex


class JsonlRecords:
    """Random access by byte offsets: the lines themselves, which may embed images, stay on disk."""

    def __init__(self, files: Sequence[Path], image_folders: Sequence[Path] = ()):
        self.name = files[0].stem
        self._files, self._image_folders = list(files), list(image_folders)
        self._lines = [_lines_of(file) for file in files]
        self._index = FileIndex([len(lines) for lines in self._lines])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file, line = self._index.find(index)
        with self._files[file].open("rb") as stream:
            stream.seek(int(self._lines[file][line, 0]))
            text = stream.readline()
        return parse_object(text, self.place(index))

    def place(self, index: int) -> str:
        file, line = self._index.find(index)
        return f"{self._files[file]}, line {self._lines[file][line, 1]}"

    def folders(self, index: int) -> Sequence[Path]:
        return (*self._image_folders, self._files[self._index.find(index)[0]].parent)


def parse_object(text: bytes, place: str) -> Mapping[str, Any]:
    """Returns the JSON object in `text`. Raises `DataError`, naming the place, if it is none."""
    try:
        record = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{place}: needs an object ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: needs an object, not {type(record).__name__}")
    return record


def _lines_of(file: Path) -> np.ndarray:
    """Returns the byte offset and the number (from 1) of every line that is not blank, [N, 2]."""
    places, offset = [], 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                places.append((offset, number))
            offset += len(line)
    return np.array(places, np.int64).reshape(-1, 2)
