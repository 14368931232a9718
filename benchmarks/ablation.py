"""`make ablation`: the paper's table 5 on the digits task: what each part of AEPO adds, at equal sampled tokens.

The cold start of the run in `--workdir` is shared; each row trains from it with three seeds into `<workdir>/ablation`,
two at a time, until the same number of response tokens has been sampled. Interrupted, it goes on where it was. The table
and the plot go to `benchmarks/RESULTS.md`.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
from absl import flags
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.metrics import write_atomic
from ares_jax.rewards.hard_split import FILE as HARD_SPLIT
from configs.methods import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

_TOKENS = flags.DEFINE_integer("tokens", 600_000, "response tokens that each row samples")
_SEEDS = flags.DEFINE_integer("seeds", 3, "seeds a row")
LEVELS = ("easy", "medium", "hard")
RESULTS = Path(__file__).with_name("RESULTS.md")
_PLOT = Path(__file__).with_name("ablation.png")
_HEADING = "## Ablation on the digits task"

_TEST = "('digits://test?size=6000',)"  # the demo's 900 tell differences of 5 points apart, not of 2
_COLD_START = "cold start"
ROWS = {
    "+ GRPO": METHODS["grpo"],
    "DAPO-style": METHODS["dapo"],
    "+ dynamic KL": METHODS["dynamic_kl"],
    "+ entropy shaping": METHODS["entropy_shaping"],
    "full (branching)": METHODS["aepo"],
    "full, windows of 4": {**METHODS["aepo"], "window": 4},  # as in the paper
}


def main(config: ConfigDict, workdir: Path) -> None:
    if not (workdir / "checkpoints" / "cold_start").is_dir():
        raise UserError(f"{workdir}: no cold start to begin from; run `make demo` first")
    _command(workdir, "evaluate", _open(workdir, _COLD_START, 0), {}, 0)
    jobs = [(row, seed) for seed in range(_SEEDS.value) for row in ROWS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: _run(workdir, *job), jobs))
    _write_results(workdir)


def _folder(workdir: Path, row: str, seed: int) -> Path:
    name = "".join(c for c in row if c.isalnum())
    return workdir / "ablation" / f"{name}-{seed}"


def _run(workdir: Path, row: str, seed: int) -> None:
    folder = _open(workdir, row, seed)
    if (folder / "evaluation" / "aepo.json").exists():
        return
    (folder / "evaluation").mkdir(exist_ok=True)
    shutil.copy(_folder(workdir, _COLD_START, 0) / "evaluation" / "cold_start.json", folder / "evaluation")
    overrides = {**ROWS[row], "token_budget": _TOKENS.value, "steps": 10_000, "validate_every": 10_000, "save_every": 20}
    for command in ("train", "evaluate"):
        _command(workdir, command, folder, overrides, seed)
    print(f"done: {row}, seed {seed}", flush=True)


def _open(workdir: Path, row: str, seed: int) -> Path:
    """Makes the folder of a run that begins from the shared cold start."""
    folder = _folder(workdir, row, seed)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "cold_start").mkdir(exist_ok=True)
    for name in ("checkpoints/cold_start", "tokenizer", f"cold_start/{HARD_SPLIT}"):
        if (workdir / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to((workdir / name).absolute())
    return folder


def _command(workdir: Path, command: str, folder: Path, overrides: dict, seed: int) -> None:
    config = next(a for a in sys.argv if a.startswith("--config="))
    arguments = [config, f"--workdir={folder}", f"--config.seed={seed}", f"--config.data.test={_TEST}"]
    arguments += [f"--config.aepo.{name}={value}" for name, value in overrides.items()]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str((workdir / "compilation_cache").absolute())}
    with (folder / f"{command}.log").open("a") as log:
        result = subprocess.run(
            [sys.executable, "-m", f"ares_jax.{command}", *arguments], env=environment, stdout=log, stderr=log
        )
    if result.returncode:
        raise UserError(f"{command} ended with {result.returncode}; see {folder / command}.log, then start again to go on")


def _write_results(workdir: Path) -> None:
    cold = json.loads((_folder(workdir, _COLD_START, 0) / "evaluation" / "cold_start.json").read_text())["levels"]
    rows = {_COLD_START: [cold]}
    for row in ROWS:
        files = [_folder(workdir, row, seed) / "evaluation" / "aepo.json" for seed in range(_SEEDS.value)]
        rows[row] = [json.loads(file.read_text())["levels"] for file in files]
    problems = sum(cold[level]["problems"] for level in LEVELS)
    header = "| row | average | " + " | ".join(f"{level} | tokens" for level in LEVELS) + " |"
    lines = [header, "|---|---|" + "---|" * 6]
    for row, results in rows.items():
        cells = [_spread([100 * _average(result) for result in results])]
        for level in LEVELS:
            for name, scale in (("accuracy", 100), ("mean_tokens", 1)):
                cells.append(_spread([scale * result[level][name] for result in results]))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    text = (
        f"{_HEADING}\n\n`make ablation`: {_TOKENS.value:,} sampled response tokens a row, {_SEEDS.value} seeds, one cold "
        f"start; {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}. Accuracy in % and mean response "
        f"tokens on the {problems} problems of the test split; mean +- standard deviation over seeds.\n\n"
        + "\n".join(lines)
        + "\n\nFull minus GRPO, with the 95 % interval of the difference (all seeds pooled, as binomials): "
        + "; ".join(f"{level} {_difference(rows, level)}" for level in LEVELS)
        + f".\n\n![ablation]({_PLOT.name})\n"
    )
    print(text)
    _draw(rows)
    _replace_section(RESULTS, text)


def _average(result: dict) -> float:
    return statistics.mean(result[level]["accuracy"] for level in LEVELS)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _difference(rows: dict[str, list[dict]], level: str) -> str:
    (full, n), (plain, m) = (
        (statistics.mean(r[level]["accuracy"] for r in rows[row]), sum(r[level]["problems"] for r in rows[row]))
        for row in ("full (branching)", "+ GRPO")
    )
    half = 1.96 * (full * (1 - full) / n + plain * (1 - plain) / m) ** 0.5
    return f"{100 * (full - plain):+.1f} +- {100 * half:.1f}"


def _draw(rows: dict[str, list[dict]]) -> None:
    """One panel a level: mean tokens against accuracy, a point a seed, a large one for the mean."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, level in zip(axes, LEVELS, strict=True):
        for number, (row, results) in enumerate(rows.items()):
            tokens = [result[level]["mean_tokens"] for result in results]
            accuracy = [100 * result[level]["accuracy"] for result in results]
            axis.scatter(tokens, accuracy, s=12, color=f"C{number}", alpha=0.5)
            axis.scatter(statistics.mean(tokens), statistics.mean(accuracy), s=70, color=f"C{number}", label=row)
        axis.set(title=level, xlabel="response tokens")
    axes[0].set_ylabel("test accuracy (%)")
    axes[-1].legend(fontsize=8)
    figure.savefig(_PLOT, dpi=110)


def _replace_section(file: Path, section: str) -> None:
    """Puts `section` in the place of the one with the same heading, or at the end."""
    text = file.read_text()
    start = text.find(_HEADING)
    if start < 0:
        write_atomic(file, text.rstrip() + "\n\n" + section)
        return
    end = text.find("\n## ", start)
    write_atomic(file, text[:start] + section + (text[end:] if end >= 0 else ""))


if __name__ == "__main__":
    cli.run(main)
