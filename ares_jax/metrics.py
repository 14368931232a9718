"""Metrics to `metrics.jsonl`, TensorBoard and Weights & Biases; the record of a run's stages."""

import importlib.util
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboardX import SummaryWriter

from ares_jax.parallel.distributed import is_first


class MetricsWriter:
    """Writes the numbers of each step to `metrics.jsonl`, to TensorBoard, and to Weights & Biases if its key is set.

    Of several processes the first writes, the others do nothing.

    On resumption, what was written of steps that will be done again is dropped. Weights & Biases is used where the package
    is installed and WANDB_API_KEY (or WANDB_MODE=offline) stands in the environment.
    """

    def __init__(self, folder: Path, resume_at: int):
        self._wandb = self._board = None
        if not is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_jsonl(self._path) if line["step"] <= resume_at]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)
        if importlib.util.find_spec("wandb") and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
            import wandb

            run = f"{folder.parent.name}-{folder.name}"
            self._wandb = wandb.init(project="ares-jax", name=run, id=run, dir=str(folder), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends `values`; in the JSONL a number that is not finite is null, which JSON can hold."""
        if self._board is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        record = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        append_jsonl(self._path, [{"step": step, "time": time.time(), **record}])
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


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


def goodput_sentence(metrics: Iterable[Mapping[str, float | None]]) -> str:
    """Returns what a stage's last `goodput` says; nothing where there is none."""
    shares = [line["goodput"] for line in metrics if line.get("goodput") is not None]
    if not shares:
        return ""
    return (
        f"Goodput {shares[-1]:.0%}: that much of the time since AEPO was first begun, interruptions included, went into "
        "steps that count; a first step, which compiles, validation and saving do not."
    )


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all. Of several processes the first writes."""
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # a folder may be other hosts', too
    temporary.write_text(text)
    temporary.replace(path)


def append_jsonl(path: Path, records: Iterable) -> None:
    """Adds one line a record. Of several processes the first writes."""
    if is_first():
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


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
