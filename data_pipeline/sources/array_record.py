"""ArrayRecord: each record is one JSON object, as a line of JSONL is. Records of tf.Example are read by `tfds://`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain

from data_pipeline.errors import DataError
from data_pipeline.sources.jsonl import parse_object


class ArrayRecords:
    """Random access to the records of ArrayRecord files."""

    def __init__(self, files: Sequence[Path]):
        self.name = files[0].stem
        self._folders = list(dict.fromkeys(file.parent for file in files))
        self._files = ", ".join(map(str, files[:1])) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            self._size = len(self._records)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self._files}: not ArrayRecord ({str(error).splitlines()[0]})") from None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return parse_object(self._records[index], self.place(index))

    def place(self, index: int) -> str:
        return f"{self._files}, record {index}"

    def folders(self, index: int) -> Sequence[Path]:
        return self._folders
