"""Reads what a run has written so far; what is not there yet is empty."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares_jax.metrics import read_jsonl

STAGES = {"base": "base", "cold_start": "cold start", "aepo": "AEPO"}
LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class RunRecords:
    """All files of a run's folder."""

    folder: Path
    config: dict[str, Any]
    stages: list[dict]
    metrics: list[dict]  # of AEPO
    rollouts: list[dict]
    curation: dict[str, Any]
    evaluations: dict[str, dict]  # by stage
    environments: dict[str, dict[str, str]]  # by command


def load_run(folder: Path) -> RunRecords:
    """Returns the run in `folder`."""
    return RunRecords(
        folder,
        _json(folder / "config.json", {}),
        _json(folder / "stages.json", []),
        read_jsonl(folder / "aepo" / "metrics.jsonl"),
        read_jsonl(folder / "aepo" / "rollouts.jsonl"),
        _json(folder / "cold_start" / "curation.json", {}),
        {name: value for name in STAGES if (value := _json(folder / "evaluation" / f"{name}.json", None))},
        {path.stem: _json(path, {}) for path in sorted((folder / "environment").glob("*.json"))},
    )


def last_change(folder: Path) -> float:
    """Returns when a file that the report reads was last written."""
    patterns = ("*.json", "*/*.json", "aepo/*.jsonl")
    return max((path.stat().st_mtime for pattern in patterns for path in folder.glob(pattern)), default=0.0)


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, where it was measured."""
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def branching_totals(metrics: list[dict]) -> dict[str, float]:
    """Returns sums over the run: leaves, branches, tokens shared and computed."""
    names = {"leaves": "leaves", "branches": "branches", "shared": "tokens/shared", "computed": "tokens/computed"}
    return {key: sum(series(metrics, name)[1]) for key, name in names.items()}


def _json(path: Path, default):
    return json.loads(path.read_text()) if path.exists() else default
