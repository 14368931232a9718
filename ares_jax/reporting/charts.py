"""The plots of a run (matplotlib). Each function returns a figure, or None while there is nothing to draw."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.figure import Figure  # noqa: E402

from ares_jax.reporting.load import LEVELS, Run, series  # noqa: E402

COLORS = {"easy": "#2a9d8f", "medium": "#e09f3e", "hard": "#c1443c"}
_STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 11, "axes.titleweight": "bold", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def training_curves(run: Run) -> Figure | None:
    """Accuracy and length per difficulty on the validation split over training."""
    panels = [("validation/accuracy", "accuracy (validation)"), ("validation/length", "response tokens (validation)")]
    return _per_level(run, panels)


def rollout_curves(run: Run) -> Figure | None:
    """The same in the rollouts, where the buckets follow the measured difficulty."""
    panels = [("length", "response tokens (rollouts)"), ("windows", "validated windows a leaf"), ("groups", "groups drawn")]
    return _per_level(run, panels)


def kl_curves(run: Run) -> Figure | None:
    """KL to the cold start and its weight, per difficulty bucket."""
    return _per_level(run, [("kl", "KL to the cold start (nats a token)"), ("kl_weight", "KL weight")])


def reward_curves(run: Run) -> Figure | None:
    """Reward parts, entropies and branches over training."""
    groups = [
        ("reward", {"reward/mean": "overall", "reward/accuracy": "accuracy", "reward/shaping": "shaping"}),
        ("entropy (nats)", {"entropy/mean": "token", "entropy/window": "window", "tau_high": "tau_high"}),
        ("leaves an iteration", {"leaves": "all", "branches": "branches"}),
    ]
    if not series(run.metrics, "reward/mean")[0]:
        return None
    figure, axes = _figure(len(groups))
    for axis, (title, names) in zip(axes, groups, strict=True):
        for name, label in names.items():
            axis.plot(*series(run.metrics, name), label=label)
        axis.set(title=title, xlabel="step")
        axis.legend()
    return figure


def curation_plot(run: Run) -> Figure | None:
    """Trace length by pass rate before and after curation, and how evenly problems were selected."""
    if not run.curation:
        return None
    brackets = run.curation["brackets"]
    rates = [b["pass_rate"] for b in brackets]
    figure, (left, right) = _figure(2)
    left.plot(rates, [b["length_before"] for b in brackets], "o--", color="#888", label="all traces, mean")
    kept = [(b["pass_rate"], b["length_after"]) for b in brackets if b["length_after"] is not None]
    left.plot(*zip(*kept, strict=True), "o-", color="#264653", label="kept")
    for source, ends in run.curation["lengths"].items():
        left.plot([0, 1], [ends["at_0"], ends["at_1"]], ":", color=COLORS["hard"], label=f"target, {source}")
    left.set(title="trace length by pass rate", xlabel="pass rate", ylabel="tokens")
    left.legend()
    right.bar(rates, [b["problems"] for b in brackets], width=0.1, color="#ccc", label="measured")
    right.bar(rates, [b["selected"] for b in brackets], width=0.06, color="#264653", label="selected")
    right.set(title="problems by pass rate", xlabel="pass rate")
    right.legend()
    return figure


def entropy_along(record: dict, leaf_index: int) -> Figure:
    """Token and window entropy along one response, with the threshold and the points where it branched."""
    leaf = record["leaves"][leaf_index]
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(11, 3.6))
    places = range(len(leaf["tokens"]))
    axis.bar(places, leaf["entropies"], color="#b9cbd6", label="token entropy")
    windows = [(i, m) for i, m in enumerate(leaf["window_means"]) if m > 0]
    if windows:
        axis.step(*zip(*windows, strict=True), where="mid", color="#264653", label="window mean, from its start")
    axis.axhline(record["tau_high"], ls="--", color=COLORS["hard"], lw=1, label="tau_high")
    for at in sorted({b["branch_position"] for b in record["leaves"] if b["parent"] == leaf_index}):
        axis.axvline(at, color=COLORS["medium"], lw=2.5, alpha=0.8)
        axis.annotate("branch", (at, 1), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=8)
    labels = [token.replace("$", r"\$").strip() or "␣" for token in leaf["tokens"]]
    axis.set_xticks(list(places), labels, rotation=90, fontsize=7)
    axis.set(ylabel="nats", title=f"step {record['step']}: {record['question']}")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left")
    return figure


def _per_level(run: Run, panels: list[tuple[str, str]]) -> Figure | None:
    if not any(series(run.metrics, f"{name}/{level}")[0] for name, _ in panels for level in LEVELS):
        return None
    figure, axes = _figure(len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for level in LEVELS:
            steps, values = series(run.metrics, f"{name}/{level}")
            axis.plot(steps, values, color=COLORS[level], label=level, marker="o" if len(steps) < 20 else None, ms=4)
        axis.set(title=title, xlabel="step")
        axis.legend()
    return figure


def _figure(panels: int):
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.3), squeeze=False)
    return figure, axes[0]
