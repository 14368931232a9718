"""Where problems come from, and deterministic, checkpointable iterators over them (grain)."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from data_pipeline.digits import DigitsSource
from data_pipeline.errors import DataError
from data_pipeline.images import decode_image, from_data_url
from data_pipeline.prompts import Problem


class Source(Protocol):
    """Random access to problems (or to anything a transform of `make_iterator` takes)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Any: ...


class JsonlSource:
    """Problems of JSONL files, one object a line:

    {"problem_id": str, "source": str, "level": "easy"|"medium"|"hard", "question": str, "answer": str,
     "images": [path, relative to the file, or data URL, or base64], "responses": [teacher traces]}

    `question` and `answer` are required. Raises `DataError` naming file and line where a line or an image is bad.
    """

    def __init__(self, files: Sequence[str | Path]):
        self._lines: list[tuple[Path, int, str]] = []
        for file in map(Path, files):
            if not file.is_file():
                raise DataError(f"{file}: no such file; data.*_files lists JSONL files")
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                if line.strip():
                    self._lines.append((file, number, line))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Problem:
        file, number, line = self._lines[index]
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
            question, answer = str(record["question"]), str(record["answer"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{place}: needs an object with question and answer ({error!r})") from None
        images = tuple(_read_image(image, file.parent, place) for image in record.get("images", ()))
        return Problem(
            str(record.get("problem_id", f"{file.stem}-{number}")), str(record.get("source", file.stem)),
            str(record.get("level", "medium")), question, images, answer, tuple(record.get("responses", ())),
        )  # fmt: skip


def make_source(name: str, split: str, *, files: Sequence[str] = (), size: int = 0, seed: int = 0) -> Source:
    """Returns the problems of one split: the generated digits task (`size` of them), or JSONL files."""
    if name == "digits":
        return DigitsSource(split, size, seed)
    if name == "jsonl":
        if not files:
            raise DataError(f"data.{split}_files is empty; name the JSONL files of the {split} split")
        return JsonlSource(files)
    raise DataError(f"data.source={name!r} is not one of digits, jsonl")


def make_iterator(
    source: Source,
    transform: Callable[[Any], Any],
    *,
    seed: int,
    epochs: int | None = None,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an iterator over `transform(problem)`, reshuffled every epoch; with `batch_size`, over lists of so many.

    The order depends on `seed` alone. `get_state()` and `set_state()` resume anywhere, also inside an epoch; the
    transform runs ahead in threads. `epochs=None` never ends. Each process reads its own share.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()[process_index::process_count]
    dataset = dataset.repeat(epochs).map(transform)
    if batch_size is not None:
        dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=list)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def _read_image(image: str, folder: Path, place: str) -> np.ndarray:
    try:
        if image.startswith("data:"):
            return from_data_url(image)
        path = folder / image if len(image) < 1024 else None
        if path is not None and path.is_file():
            return decode_image(path.read_bytes())
        if path is not None and path.suffix:
            raise DataError("no such file")
        return decode_image(base64.b64decode(image, validate=True))
    except ValueError as error:
        raise DataError(f"{place}: image {image[:80]!r}: {error}") from None
