"""Two evaluations side by side: which is better where, is it chance, and what did the accuracy cost in length.

A difference is tested on the units that both runs answered, resampled together (paired bootstrap: Berg-Kirkpatrick et
al., "An Empirical Investigation of Statistical Significance in NLP", EMNLP 2012).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ares_jax.errors import UserError
from ares_jax.evaluation.benchmark import Benchmark, Graded, Sample, mean
from ares_jax.evaluation.scores import Answered, unit_values

_RESAMPLES = 10_000
_FEW_RESAMPLES = 1000  # of scores that are no mean: each takes milliseconds
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark in both runs, on the units that both answered."""

    benchmark: str
    metric: str
    a: float
    b: float
    interval: tuple[float, float]  # of b - a, 95 %
    p: float  # two-sided
    length_a: float
    length_b: float
    units: int


def load_results(run: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of a run by benchmark: `run` is an output folder, or one results file.

    Raises:
      UserError: there is none, or a folder holds those of several models.
    """
    files = [run] if run.is_file() else sorted(run.glob("*___*.json"))
    if not files:
        raise UserError(f"--compare: {run} holds no <model>___<benchmark>.json; name an --output-dir or such a file")
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            result = json.loads(file.read_text())
            name = result["benchmark"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--compare: {file} is no results file ({error})") from None
        if name in results:
            raise UserError(
                f"--compare: {run} holds {name} of {results[name]['model']} and {result['model']}; name one file"
            )
        results[name] = result
    return results


def compared(a: Mapping[str, Any], b: Mapping[str, Any], benchmarks: Mapping[str, Benchmark]) -> list[Row]:
    """Returns a row for each metric of each benchmark that both runs hold. Raises `UserError` if there is none."""
    rows = [row for name in a if name in b for row in _rows(benchmarks[name], a[name], b[name])]
    if not rows:
        raise UserError(f"--compare: no benchmark and unit is in both: {', '.join(a)} and {', '.join(b)}")
    return rows


def table(rows: Sequence[Row], names: tuple[str, str]) -> str:
    """Returns the side-by-side table as Markdown."""
    lines = [
        f"| benchmark | metric | units | {names[0]} | {names[1]} | difference [95 %] | p | length | length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " *" if row.p < SIGNIFICANT else ""
        lines.append(
            f"| {row.benchmark} | {row.metric} | {row.units} | {100 * row.a:.1f} | {100 * row.b:.1f} | "
            f"{100 * (row.b - row.a):+.1f} [{100 * row.interval[0]:+.1f}, {100 * row.interval[1]:+.1f}] | "
            f"{row.p:.3f}{mark} | {row.length_a:.0f} | {row.length_b:.0f} |"
        )
    return "\n".join([*lines, "", f"\\* p < {SIGNIFICANT} (paired bootstrap over units); on the units that both answered."])


def plot(rows: Sequence[Row], names: tuple[str, str], path: Path) -> None:
    """Draws accuracy against mean response length: an arrow from the first run to the second for each benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = list({row.benchmark: row for row in reversed(rows)}.values())[::-1]  # the headline of each
    figure, axis = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for row, color in zip(heads, plt.colormaps["tab20"](np.linspace(0, 1, len(heads))), strict=True):
        axis.plot([row.length_a, row.length_b], [100 * row.a, 100 * row.b], "-", color=color, lw=1)
        axis.plot(row.length_a, 100 * row.a, "o", mfc="white", color=color)
        axis.plot(row.length_b, 100 * row.b, "o", color=color)
        axis.annotate(row.benchmark, (row.length_b, 100 * row.b), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.plot([], [], "o", mfc="white", color="#555", label=names[0])
    axis.plot([], [], "o", color="#555", label=names[1])
    axis.set(xlabel="mean response length", ylabel="score (%)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))
    plt.close(figure)
    temporary.replace(path)


def paired_difference(
    a: Float[np.ndarray, "U"], b: Float[np.ndarray, "U"], groups: Sequence[Mapping[str, str]], combine=mean
) -> tuple[tuple[float, float], float]:
    """Returns the 95 % interval of combine(b) - combine(a) over resampled pairs, and the two-sided p-value of 0."""
    rng, count = np.random.default_rng(0), len(a)
    if combine is mean:
        weights = (rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES // 20) for _ in range(20))
        resampled = np.concatenate([part @ (b - a) / count for part in weights])
    else:
        picks = (rng.integers(count, size=count) for _ in range(_FEW_RESAMPLES))
        resampled = np.array([_difference(a[i], b[i], [groups[j] for j in i], combine) for i in picks])
    observed = _difference(a, b, groups, combine)
    p = (np.sum(np.abs(resampled - observed) >= abs(observed) - 1e-12) + 1) / (len(resampled) + 1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return (float(low), float(high)), float(p)


def _difference(a: np.ndarray, b: np.ndarray, groups: Sequence[Mapping[str, str]], combine) -> float:
    return combine(b, groups) - combine(a, groups)


def _rows(benchmark: Benchmark, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    tokens = a["metrics"]["length_unit"] == b["metrics"]["length_unit"] == "tokens"
    ours, theirs = (_units(result, tokens) for result in (a, b))
    both = [unit for unit in ours if unit in theirs and len(ours[unit]) == len(theirs[unit])]
    if not both:
        return []
    answers_a, answers_b = ([item for unit in both for item in units[unit]] for units in (ours, theirs))
    length_a, length_b = (float(np.mean([item.length for item in answers])) for answers in (answers_a, answers_b))
    groups = [ours[unit][0].graded.sample.groups for unit in both]
    rows = []
    for metric in benchmark.metrics:
        values = [unit_values(metric, answers) for answers in (answers_a, answers_b)]
        x, y = (np.array([value[unit] for unit in both]) for value in values)
        interval, p = paired_difference(x, y, groups, metric.combine)
        scores = metric.combine(x, groups), metric.combine(y, groups)
        rows.append(Row(benchmark.name, metric.name, *scores, interval, p, length_a, length_b, len(both)))
    return rows


def _units(result: Mapping[str, Any], tokens: bool) -> dict[str, list[Answered]]:
    """Returns the units that were answered whole."""
    broken = {line["unit"] for line in result["results"] if line["error"]}
    units: dict[str, list[Answered]] = {}
    for line in result["results"]:
        if line["unit"] not in broken:
            sample = Sample(line["id"], (), line["answer"], line["unit"], line["groups"])
            graded = Graded(sample, float(line["correct"] is True))
            units.setdefault(line["unit"], []).append(Answered(graded, line["tokens"] if tokens else len(line["response"])))
    return units
