"""The plots of a run (matplotlib). Each function returns a figure, or None while there is nothing to draw."""

import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.figure import Figure  # noqa: E402

from ares_jax.reporting.load import LEVELS, RunRecords, series  # noqa: E402

COLORS = {"easy": "#2a9d8f", "medium": "#e09f3e", "hard": "#c1443c"}
_DARK, _ACCENT = "#264653", "#7b4fa3"  # apart from the levels'
_MOST_LABELS = 120  # tokens beyond which their names under the axis would not be read
_STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 11, "axes.titleweight": "bold", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


@matplotlib.rc_context(_STYLE)
def training_curves(run: RunRecords) -> Figure | None:
    """Accuracy and length per difficulty on the validation split over training; step 0 is the cold start."""
    panels = [
        ("validation/accuracy", "accuracy (validation, step 0: cold start)"),
        ("validation/length", "response tokens (validation)"),
    ]
    return _per_level(run, panels)


@matplotlib.rc_context(_STYLE)
def rollout_curves(run: RunRecords) -> Figure | None:
    """The same in the rollouts, where the buckets follow the measured difficulty."""
    panels = [("length", "response tokens (rollouts)"), ("windows", "validated windows a leaf"), ("groups", "groups drawn")]
    return _per_level(run, panels)


@matplotlib.rc_context(_STYLE)
def kl_curves(run: RunRecords) -> Figure | None:
    """KL to the cold start and its weight, per difficulty bucket."""
    return _per_level(run, [("kl", "KL to the cold start (nats a token)"), ("kl_weight", "KL weight")])


@matplotlib.rc_context(_STYLE)
def reward_curves(run: RunRecords) -> Figure | None:
    """Reward parts, entropies and branches over training."""
    groups = [
        ("reward", {"reward/mean": "overall", "reward/accuracy": "accuracy", "reward/shaping": "shaping"}),
        ("entropy (nats)", {"entropy/mean": "token", "entropy/window": "window", "tau_high": "tau_high"}),
        ("leaves an iteration", {"leaves": "all", "branches": "branches"}),
    ]
    return _named(run, groups) if series(run.metrics, "reward/mean")[0] else None


@matplotlib.rc_context(_STYLE)
def reward_parts(run: RunRecords) -> Figure | None:
    """What the leaves of each difficulty earned, and how much of it is shaping."""
    return _per_level(run, [("reward", "reward"), ("accuracy", "of it: accuracy"), ("shaping", "of it: shaping")])


@matplotlib.rc_context(_STYLE)
def policy_curves(run: RunRecords) -> Figure | None:
    """How far the policy that learns is from the one that drew the tokens."""
    groups = [
        ("staleness (updates since a token was drawn)", {"staleness/mean": "mean", "staleness/max": "largest"}),
        ("log-prob, learner and sampler (nats apart)", {"mismatch": "mismatch"}),
        ("gradient norm", {"grad_norm": "before clipping"}),
    ]
    return _named(run, groups) if series(run.metrics, "staleness/mean")[0] else None


@matplotlib.rc_context(_STYLE)
def time_curves(run: RunRecords) -> Figure | None:
    """Seconds of each phase, how much of the sampling ran beside the learning, and tokens a second."""
    phases = ("sample", "wait", "data", "learn", "push", "validate", "save", "step")
    speeds = {"sample": "sampled", "learn": "learned", "step": "sampled, of all time"}
    groups = [
        ("seconds an iteration", {f"time/{name}": name for name in phases}),
        ("share of sampling beside learning", {"overlap": "overlap"}),
        ("response tokens a second", {f"tokens_per_second/{name}": label for name, label in speeds.items()}),
    ]
    return _named(run, groups) if series(run.metrics, "time/step")[0] else None


@matplotlib.rc_context(_STYLE)
def curation_plot(run: RunRecords) -> Figure | None:
    """Trace length by pass rate before and after curation, and how evenly problems were selected."""
    if not run.curation:
        return None
    brackets = run.curation["brackets"]
    rates = [b["pass_rate"] for b in brackets]
    figure, (left, right) = _figure(2)
    left.plot(rates, [b["length_before"] for b in brackets], "o--", color="#888", label="all traces, mean")
    kept = [(b["pass_rate"], b["length_after"]) for b in brackets if b["length_after"] is not None]
    left.plot(*zip(*kept, strict=True), "o-", color=_DARK, label="kept")
    for source, ends in run.curation["lengths"].items():
        left.plot([0, 1], [ends["at_0"], ends["at_1"]], ":", color=_ACCENT, lw=2, label=f"target, {source}")
    left.set(title="trace length by pass rate", xlabel="pass rate", ylabel="tokens")
    left.legend()
    gap = min((b - a for a, b in zip(rates, rates[1:], strict=False)), default=0.125)
    right.bar(rates, [b["problems"] for b in brackets], width=0.85 * gap, color="#ccc", label="measured")
    right.bar(rates, [b["selected"] for b in brackets], width=0.6 * gap, color=_DARK, label="selected")
    right.set(title="problems by pass rate", xlabel="pass rate")
    right.legend()
    return figure


@matplotlib.rc_context(_STYLE)
def entropy_along(record: dict, leaf_index: int) -> Figure:
    """Token and window entropy along one response, with the threshold and the points where it branched."""
    leaf = record["leaves"][leaf_index]
    figure, axis = plt.subplots(figsize=(11, 3.6))
    places = range(len(leaf["tokens"]))
    edges = [i - 0.5 for i in range(len(places) + 1)]
    axis.stairs(leaf["entropies"], edges, fill=True, color="#b9cbd6", label="token entropy")
    windows = [(i, m) for i, m in enumerate(leaf["window_means"]) if m > 0]
    if windows:
        axis.step(*zip(*windows, strict=True), where="mid", color=_DARK, label="window mean, from its start")
    axis.axhline(record["tau_high"], ls="--", color=_ACCENT, lw=1.2, label="tau_high")
    for at in sorted({b["branch_position"] for b in record["leaves"] if b["parent"] == leaf_index}):
        axis.axvline(at, color=_ACCENT, lw=2.5, alpha=0.6)
        axis.annotate("branch", (at, 1), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=8)
    if len(places) <= _MOST_LABELS:
        labels = [_plain(token.strip()[:16]) or "␣" for token in leaf["tokens"]]
        axis.set_xticks(list(places), labels, rotation=90, fontsize=7)
    else:
        axis.set_xlabel("response token")
    axis.set_ylabel("nats")
    axis.set_xlim(-0.5, max(len(places), 1) - 0.5)
    question = textwrap.shorten(record["question"], 90, placeholder=" ...")
    axis.set_title(_plain(f"step {record['step']}: {question}" if "step" in record else question), loc="left")
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def _per_level(run: RunRecords, panels: list[tuple[str, str]]) -> Figure | None:
    if not any(series(run.metrics, f"{name}/{level}")[0] for name, _ in panels for level in LEVELS):
        return None
    figure, axes = _figure(len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for level in LEVELS:
            steps, values = series(run.metrics, f"{name}/{level}")
            axis.plot(steps, values, color=COLORS[level], label=level, marker="o" if len(steps) < 20 else None, ms=4)
        axis.set(title=title, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(LEVELS))
    return figure


def _named(run: RunRecords, groups: list[tuple[str, dict[str, str]]]) -> Figure:
    """One panel for each (title, {metric: label}); what was not measured is left out."""
    figure, axes = _figure(len(groups))
    for axis, (title, names) in zip(axes, groups, strict=True):
        for name, label in names.items():
            steps, values = series(run.metrics, name)
            if steps:
                axis.plot(steps, values, label=label, marker="o" if len(steps) < 20 else None, ms=3)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend()
    return figure


def _figure(panels: int):
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.3), squeeze=False)
    return figure, axes[0]


def _plain(text: str) -> str:
    """Returns `text` such that matplotlib does not take what stands between dollar signs for TeX."""
    return text.replace("$", r"\$")
