"""`make ablation`: the paper's table 5 on the digits task: what each part of AEPO adds, at equal sampled tokens.

The cold start of the run in `--workdir` is shared; each row trains from it with three seeds into `<workdir>/ablation`,
two at a time, until the same number of response tokens has been sampled. Interrupted, it goes on where it was.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ares_jax import cli
from ares_jax.errors import UserError
from ares_jax.metrics import write_atomic

_TOKENS = flags.DEFINE_integer("tokens", 600_000, "response tokens that each row samples")
_SEEDS = flags.DEFINE_integer("seeds", 3, "seeds a row")
LEVELS = ("easy", "medium", "hard")

_PLAIN = {"root_leaves": 8, "shaping": "none", "kl.dynamic": False, "kl.rho": 1.0}
ROWS = {
    "+ GRPO": _PLAIN,
    "+ dynamic KL": {**_PLAIN, "kl.dynamic": True, "kl.rho": 0.5},
    "+ entropy shaping": {"root_leaves": 8},
    "full (branching)": {},
}


def main(config: ConfigDict, workdir: Path) -> None:
    if not (workdir / "checkpoints" / "cold_start").is_dir():
        raise UserError(f"{workdir}: no cold start to begin from; run `make demo` first")
    jobs = [(row, seed) for seed in range(_SEEDS.value) for row in ROWS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: _run(workdir, *job), jobs))
    _write_table(workdir)


def _folder(workdir: Path, row: str, seed: int) -> Path:
    name = "".join(c for c in row if c.isalnum())
    return workdir / "ablation" / f"{name}-{seed}"


def _run(workdir: Path, row: str, seed: int) -> None:
    folder = _folder(workdir, row, seed)
    if (folder / "evaluation" / "aepo.json").exists():
        return
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints/cold_start", "tokenizer"):
        if not (folder / name).exists():
            (folder / name).symlink_to((workdir / name).absolute())
    overrides = {**ROWS[row], "token_budget": _TOKENS.value, "steps": 10_000, "validate_every": 10_000, "save_every": 20}
    config = next(a for a in sys.argv if a.startswith("--config="))
    arguments = [config, f"--workdir={folder}", f"--config.seed={seed}"]
    arguments += [f"--config.aepo.{name}={value}" for name, value in overrides.items()]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str((workdir / "compilation_cache").absolute())}
    for command in ("train", "evaluate"):
        with (folder / f"{command}.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", f"ares_jax.{command}", *arguments],
                check=True,
                env=environment,
                stdout=log,
                stderr=log,
            )
    print(f"done: {row}, seed {seed}", flush=True)


def _write_table(workdir: Path) -> None:
    cold = json.loads((workdir / "evaluation" / "cold_start.json").read_text())["levels"]
    rows = {"cold start": [cold]}
    for row in ROWS:
        files = [_folder(workdir, row, seed) / "evaluation" / "aepo.json" for seed in range(_SEEDS.value)]
        rows[row] = [json.loads(file.read_text())["levels"] for file in files]
    lines = ["| row | " + " | ".join(f"{level} | tokens" for level in LEVELS) + " |", "|---|" + "---|" * 6]
    for row, results in rows.items():
        cells = []
        for level in LEVELS:
            cells += [_mean(results, level, "accuracy", 100), _mean(results, level, "mean_tokens", 1)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    command = f"`make ablation` ({_TOKENS.value:,} sampled tokens a row, {_SEEDS.value} seeds)"
    text = "\n".join(
        [
            "## Ablation on the digits task",
            "",
            f"{command}, {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}. "
            f"Test accuracy in % and mean response tokens; mean +- standard deviation over seeds.",
            "",
            *lines,
            "",
        ]  # fmt: skip
    )
    write_atomic(workdir / "ablation" / "table.md", text)
    print(text)


def _mean(results: list[dict], level: str, name: str, scale: float) -> str:
    values = [scale * result[level][name] for result in results]
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    cli.run(main)
