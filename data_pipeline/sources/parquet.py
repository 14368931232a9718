"""Parquet. Its row groups must be decompressed whole, which makes shuffled reading hopeless: each file is rewritten once
as an Arrow file in the user's cache (XDG_CACHE_HOME), from which a row is read through the page cache."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.sources.files import FileIndex

_BATCH_ROWS = 128  # rows of an Arrow batch: bounds the memory of the rewriting


class ParquetRecords:
    """Random access to the rows of Parquet files, as plain Python values."""

    def __init__(self, files: Sequence[Path], image_folders: Sequence[Path] = ()):
        self.name = files[0].stem
        self._files, self._image_folders = list(files), list(image_folders)
        self._cached = [_cached_arrow(file) for file in files]
        self._tables: list[_ArrowFile] = [_ArrowFile(file) for file in self._cached]
        self._index = FileIndex([len(table) for table in self._tables])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file, row = self._index.find(index)
        return self._tables[file][row]

    def place(self, index: int) -> str:
        file, row = self._index.find(index)
        return f"{self._files[file]}, row {row}"

    def folders(self, index: int) -> Sequence[Path]:
        return (*self._image_folders, self._files[self._index.find(index)[0]].parent)


class _ArrowFile:
    """A memory-mapped Arrow file; pickled as its path."""

    def __init__(self, path: Path):
        self._path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]  # views, not copies
        self._index = FileIndex([batch.num_rows for batch in self._batches])

    def __reduce__(self):
        return _ArrowFile, (self._path,)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch, place = self._index.find(row)
        return self._batches[batch].slice(place, 1).to_pylist()[0]


def _cached_arrow(file: Path) -> Path:
    """Returns the Arrow file that holds the rows of `file`, made if it is not there, whole or not at all."""
    status = file.stat()
    key = hashlib.blake2b(f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}".encode(), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares_jax" / "arrow"
    target = folder / f"{file.stem}-{key}.arrow"
    if target.exists():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pq.ParquetFile(file) as source, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_file(sink, source.schema_arrow) as writer:
                for batch in source.iter_batches(batch_size=_BATCH_ROWS):
                    writer.write_batch(batch)
        temporary.rename(target)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise DataError(f"{target}: {error}; XDG_CACHE_HOME names the cache's folder") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target
