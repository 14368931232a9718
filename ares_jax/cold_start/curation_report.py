"""What curation did to trace lengths: `curation.json`, the same as a table, and a picture of it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ares_jax.cold_start.curation import Candidate, Choice, summary
from ares_jax.cold_start.normalise import REJECTS
from ares_jax.metrics import write_atomic, write_json

_BINS = 12


def curation_report(candidates: Sequence[Candidate], choices: Sequence[Choice], counts: Mapping[str, Any]) -> dict:
    """Returns `summary` with histograms of trace length per pass-rate bracket, before and after, and `counts`.

    `histograms` is {"edges": [tokens], "brackets": [{"pass_rate", "before": [traces], "after": [traces]}]}; "before" counts
    every usable trace, "after" the one kept of each problem selected.
    """
    lengths = np.array([length for c in candidates for length in c.lengths], float)
    rates = np.array([c.pass_rate for c in candidates for _ in c.lengths])
    kept = np.array([candidates[c.candidate].lengths[c.trace] for c in choices], float)
    kept_rates = np.array([candidates[c.candidate].pass_rate for c in choices])
    edges = np.histogram_bin_edges(lengths, bins=_BINS)
    brackets = [
        {
            "pass_rate": float(rate),
            "before": np.histogram(lengths[rates == rate], edges)[0].tolist(),
            "after": np.histogram(kept[kept_rates == rate], edges)[0].tolist(),
        }
        for rate in np.unique(rates)
    ]
    histograms = {"edges": edges.tolist(), "brackets": brackets}
    return {**summary(candidates, choices), "histograms": histograms, **counts}


def write_report(folder: Path, report: dict) -> None:
    """Writes `curation.json`, `curation.md` and `curation.png` to `folder`, each whole or not at all."""
    write_json(folder / "curation.json", report)
    write_atomic(folder / "curation.md", table(report))
    draw(report, folder / "curation.png")


def table(report: dict) -> str:
    """Returns the report as Markdown."""
    lines = [
        "| pass rate | problems | selected | mean tokens before | mean tokens after |",
        "|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for b in report["brackets"]:
        after = "" if b["length_after"] is None else f"{b['length_after']:.0f}"
        lines.append(f"| {b['pass_rate']:.3f} | {b['problems']} | {b['selected']} | {b['length_before']:.0f} | {after} |")
    before, after = report["correlation_before"], report["correlation_after"]
    lines += [
        "",
        f"Correlation of trace length with difficulty (1 - pass rate): {before:+.3f} before, {after:+.3f} after.",
        "",
    ]
    if verdicts := report.get("verdicts"):
        lines += ["| verdict of a response | responses | |", "|---|---:|---|"]
        lines += [f"| {name} | {count} | {REJECTS.get(name, 'used')} |" for name, count in verdicts.items()]
    if problems := report.get("problems"):
        lines += ["", "| problems | |", "|---|---:|", *(f"| {name} | {count} |" for name, count in problems.items())]
    return "\n".join(lines) + "\n"


def draw(report: dict, path: Path) -> None:
    """Draws the histograms, one row a bracket (the easiest on top): all usable traces left, the kept ones right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges, brackets = report["histograms"]["edges"], report["histograms"]["brackets"][::-1]
    figure, axes = plt.subplots(
        len(brackets), 2, figsize=(9, 1.2 + 0.75 * len(brackets)), sharex=True, squeeze=False, layout="constrained"
    )
    for row, bracket in zip(axes, brackets, strict=True):
        for axis, when, color in zip(row, ("before", "after"), ("#999999", "#264653"), strict=True):
            axis.stairs(bracket[when], edges, fill=True, color=color)
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.text(0.99, 0.8, f"{sum(bracket[when])}", transform=axis.transAxes, ha="right", va="top", fontsize=8)
        row[0].set_ylabel(f"{bracket['pass_rate']:.2f}", rotation=0, ha="right", va="center")
    titles = zip(axes[0], ("before", "after"), strict=True)
    for axis, when in titles:
        axis.set_title(f"{when}: r(length, difficulty) = {report[f'correlation_{when}']:+.2f}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of a trace")
    figure.supylabel("pass rate", fontsize=10)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(path)
