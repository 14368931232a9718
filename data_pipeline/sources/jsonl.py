"""JSONL: one object a line; or one array of objects, in a file named `.json`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.files import FileIndex


class JsonlRecords:
    """Random access by byte offsets: the objects themselves, which may embed images, stay on disk."""

    def __init__(self, files: Sequence[Path], image_folders: Sequence[Path] = ()):
        self.name = files[0].stem
        self._files, self._image_folders = list(files), list(image_folders)
        self._places = [_objects_of(file) for file in files]
        self._index = FileIndex([len(places) for places in self._places])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file, i = self._index.find(index)
        begin, end, _ = self._places[file][i]
        with self._files[file].open("rb") as stream:
            stream.seek(int(begin))
            text = stream.read(int(end - begin))
        return parse_object(text, self.place(index))

    def place(self, index: int) -> str:
        file, i = self._index.find(index)
        return f"{self._files[file]}, line {self._places[file][i, 2]}"

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


def _objects_of(file: Path) -> np.ndarray:
    """Returns where every object begins and ends in bytes, and the number (from 1) of the line it begins in, [N, 3].

    Raises `DataError` if an array's end or the comma between two of its objects is missing.
    """
    with file.open("rb") as stream:
        if file.suffix == ".json" and stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            return np.array(_objects_of_array(file), np.int64).reshape(-1, 3)
        stream.seek(0)
        places, offset = [], 0
        for number, line in enumerate(stream, start=1):
            if line.strip():
                places.append((offset, offset + len(line), number))
            offset += len(line)
    return np.array(places, np.int64).reshape(-1, 3)


_SPACE = re.compile(r"[ \t\r\n]*")


def _behind_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _objects_of_array(file: Path) -> list[tuple[int, int, int]]:
    text = file.read_bytes().decode("latin-1")  # a character a byte: JSON's own are ASCII, and strings are not looked at
    decoder, line = json.JSONDecoder(strict=False), 1
    places: list[tuple[int, int, int]] = []
    begin, counted = _behind_space(text, text.index("[") + 1), 0
    while text[begin : begin + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, begin)
        except ValueError as error:
            raise DataError(f"{file}: an array of objects cannot be read ({error})") from None
        line, counted = line + text.count("\n", counted, begin), begin
        places.append((begin, end, line))
        begin = _behind_space(text, end)
        if text[begin : begin + 1] == ",":
            begin = _behind_space(text, begin + 1)
        elif text[begin : begin + 1] != "]":
            raise DataError(f"{file}, behind the object of line {line}: needs a comma or the array's end")
    if _behind_space(text, begin + 1) != len(text):
        raise DataError(f"{file}: goes on behind the array's end; one array a file")
    return places
