"""Metrics to the console and to `metrics.jsonl`; the record of a run's stages."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path


class MetricsWriter:
    """Appends one JSON object a step. On resumption, lines of steps that will be done again are dropped."""

    def __init__(self, path: Path, resume_at: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        kept = [line for line in read_jsonl(path) if line["step"] <= resume_at]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends `values`; a number that is not finite is written as null, which JSON can hold."""
        numbers = {name: _finite(float(value)) for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **numbers}) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """Reads a JSONL file; a last line that a killed process left half-written is dropped. Missing file: empty list."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1}: not JSON; remove that line") from None
    return records


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value) -> None:
    """Writes `value` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=1))


@contextmanager
def stage(workdir: Path, name: str):
    """Times one stage of the run into `workdir/stages.json`. Yields a dict: set `tokens` and any detail in it.

    Seconds add up over resumed attempts, so that the report tells what the stage cost in all.
    """
    path = workdir / "stages.json"
    entry: dict = {"tokens": 0}
    start = time.time()
    try:
        yield entry
    finally:
        stages = json.loads(path.read_text()) if path.exists() else []
        earlier = next((item for item in stages if item["name"] == name), None)
        seconds = time.time() - start + (earlier["seconds"] if earlier else 0.0)
        tokens = entry.pop("tokens") or (earlier["tokens"] if earlier else 0)
        detail = entry or (earlier["detail"] if earlier else {})
        record = {"name": name, "seconds": seconds, "tokens": int(tokens), "detail": detail}
        write_json(path, [record if item is earlier else item for item in stages] + ([] if earlier else [record]))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
