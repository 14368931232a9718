"""Data sets as the Hugging Face hub stores them: where their folder is, and the rows of their files."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ares_jax.errors import UserError
from ares_jax.evaluation.benchmark import Benchmark

Row = Mapping[str, Any]
_NAMED = 8  # files that an error names


def find_folder(benchmark: Benchmark, root: Path) -> Path:
    """Returns the folder with the benchmark's files: under `root`, or downloaded to it where the hub can be reached.

    Tried, in this order: `root/<owner>/<name>`, `root/<name>`, `root/<benchmark>`, the hub's own cache layout
    (`root/datasets--<owner>--<name>/snapshots/*`).

    Raises:
      UserError: it is nowhere and cannot be downloaded.
    """
    if not benchmark.hub:
        return root
    owner, _, name = benchmark.hub.partition("/")
    snapshots = sorted((root / f"datasets--{owner}--{name}" / "snapshots").glob("*"))
    folders = [
        folder
        for folder in (root / owner / name, root / name, root / benchmark.name, *reversed(snapshots))
        if folder.is_dir()
    ]
    for folder in folders:
        if any(matching(folder, benchmark.files)):
            return folder
    return _downloaded(benchmark, root / owner / name, folders)


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the files that any pattern matches, sorted within each."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()))


def rows(folder: Path, *patterns: str) -> Iterator[tuple[Path, Row]]:
    """Yields (file, row) of Parquet, JSONL, JSON (a list, or {key: row}: the key becomes "key") and CSV files.

    Raises:
      UserError: no such file, or it cannot be read.
    """
    files = matching(folder, patterns)
    if not files:
        raise UserError(
            f"{folder}: no file {' or '.join(patterns)}; {held(folder)}; is it the data set as the hub stores it?"
        )
    for path in files:
        try:
            for row in _READERS[path.suffix](path):
                yield path, row
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); download it again") from None


def first_rows(folder: Path, *patterns: str) -> Iterator[tuple[Path, Row]]:
    """Yields the rows of the first pattern that any file matches: for data sets whose files have had several names."""
    first = next(([pattern] for pattern in patterns if matching(folder, [pattern])), patterns)
    return rows(folder, *first)


def held(folder: Path) -> str:
    """Returns "it holds ..." with the first files of a folder, for errors."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return f"it holds {_few([name for name in names if not name.startswith('.')])}"


def value(row: Row, *names: str) -> Any:
    """Returns the first of the fields that the row has. Raises `UserError` naming them if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f"a row has no {' or '.join(names)}, only {', '.join(row)}; the data set's layout is another")


def image_bytes(image: Any, folder: Path) -> bytes:
    """Returns the encoded bytes of an image column: bytes, {"bytes", "path"}, or a path in `folder`."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, str) and (folder / image).is_file():
        return (folder / image).read_bytes()
    raise UserError(
        f"{folder}: an image is {str(image)[:60]!r}, neither bytes nor a file there; download the data set again"
    )


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _json(path: Path) -> Iterator[Row]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = [{"key": key, **row} for key, row in content.items()]
    yield from content


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


_READERS = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".csv": _csv}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "no file") + more


def _downloaded(benchmark: Benchmark, target: Path, tried: Sequence[Path]) -> Path:
    wanted = " or ".join(benchmark.files)
    found = f" ({tried[0]} has no {wanted}; {held(tried[0])})" if tried else ""
    remedy = f"`hf download --repo-type dataset {benchmark.hub} --local-dir {target}`, on a machine that can, fetches it"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{target}: no {benchmark.title} here{found}, and HF_HUB_OFFLINE is set; {remedy}")
    from huggingface_hub import list_repo_files, snapshot_download  # slow to import, and needed once

    try:
        snapshot_download(
            benchmark.hub, repo_type="dataset", allow_patterns=[*benchmark.files, "README.md"], local_dir=str(target)
        )
        names = [] if matching(target, benchmark.files) else list_repo_files(benchmark.hub, repo_type="dataset")
    except Exception as error:  # no network, no such name, gated, no room: the hub has an exception for each
        raise UserError(
            f"{target}: no {benchmark.title} here{found}, no download ({str(error).splitlines()[0]}); {remedy}"
        ) from None
    if not matching(target, benchmark.files):
        raise UserError(f"{benchmark.hub} has no file {wanted}, it has {_few(names)}: its layout changed")
    return target
