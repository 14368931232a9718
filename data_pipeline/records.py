"""A record, as data sets ship it, becomes a `Problem`: which field holds what, and the errors where one is missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.images import read_image, read_video
from data_pipeline.problems import Problem

LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Keys:
    """Names that a field may have; the first that a record holds counts. The defaults read the original's data."""

    question: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    images: tuple[str, ...] = ("images", "image")  # one, or a list
    # One, or a list; a video is a list of frames or an animated GIF, WebP or PNG: no MP4
    videos: tuple[str, ...] = ("videos", "video")
    video_fps: tuple[str, ...] = ("video_fps", "fps")  # frames a second: one number, or a list; absent: 2
    problem_id: tuple[str, ...] = ("problem_id", "global_id", "id")  # absent: file and number
    source: tuple[str, ...] = ("source", "data_source")  # data set a problem comes from; absent: the file's name
    level: tuple[str, ...] = ("level", "difficulty")  # easy, medium or hard; anything else counts as medium
    responses: tuple[str, ...] = ("responses", "response")  # teacher traces: one, or a list


class Records(Protocol):
    """Random access to the raw records of one format. Pickled to worker processes: open nothing that cannot be."""

    name: str  # of the data set, where records do not say

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def place(self, index: int) -> str:
        """Names a record in an error, such as "train.jsonl, line 3"."""
        ...

    def folders(self, index: int) -> Sequence[Path]:
        """Where the paths of its images are looked up."""
        ...


class RecordSource:
    """Random access to the problems of `records`; `limit` takes the first so many.

    `source[i]` raises `DataError`, naming the record, where it has no question or answer or an image cannot be read.
    """

    def __init__(self, records: Records, keys: Keys, limit: int | None = None):
        self._records, self._keys = records, keys
        self._size = len(records) if limit is None else min(limit, len(records))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self._size:
            raise IndexError(f"problem {index} of {self._size}")
        records, keys = self._records, self._keys
        record = records[index]
        values = {field: _first(record, names) for field, names in vars(keys).items()}
        for field in ("question", "answer"):
            if values[field] is None:
                names = getattr(keys, field)
                raise DataError(
                    f"{records.place(index)}: needs an object with {field} ({' or '.join(names)}); it has "
                    f"{', '.join(record) or 'nothing'}. data.fields.{field} names the field"
                )

        def read(field: str, reader: Callable) -> tuple[np.ndarray, ...]:
            pixels = []
            for value in _many(values[field]):
                try:
                    pixels.append(reader(value, records.folders(index)))
                except DataError as error:
                    named = f" {value[:80]!r}" if isinstance(value, str) else ""
                    raise DataError(f"{records.place(index)}: {field[:-1]}{named}: {error}") from None
            return tuple(pixels)

        level = _text(values["level"])
        return Problem(
            f"{records.name}-{index}" if values["problem_id"] is None else _text(values["problem_id"]),
            records.name if values["source"] is None else _text(values["source"]),
            level if level in LEVELS else "medium",
            _text(values["question"]),
            read("images", read_image),
            _text(values["answer"]),
            tuple(map(_text, _many(values["responses"]))),
            read("videos", read_video),
            self._rates(values["video_fps"], index),
        )

    def _rates(self, value: Any, index: int) -> tuple[float, ...]:
        try:
            return tuple(map(float, _many(value)))
        except (TypeError, ValueError):
            raise DataError(f"{self._records.place(index)}: video_fps {value!r} must be numbers") from None


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _many(value: Any) -> Sequence[Any]:
    """One thing or a list of them, as a list. Pixels [H, W, 3] are one thing; arrays of bytes (TFDS) are a list."""
    if value is None:
        return ()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return value if isinstance(value, (list, tuple)) else (value,)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
