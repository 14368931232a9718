"""The files that a URI names: a path or a pattern with `*`, sorted, so that the order of records is always the same."""

import bisect
import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.uri import Uri


def matching_files(uri: Uri) -> list[Path]:
    """Returns the files of the URI's path. Raises `DataError` if there are none."""
    path = Path(uri.path).expanduser()
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"{uri.text}: no such file {path}")
    return files


class FileIndex:
    """Finds the file, and the place in it, of the i-th of all records."""

    def __init__(self, sizes: Sequence[int]):
        self._ends = np.cumsum(np.asarray(sizes, np.int64)).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)
