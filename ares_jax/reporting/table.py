"""The table at the end: accuracy and length per difficulty for every stage."""

from pathlib import Path

from ares_jax.reporting.load import LEVELS, STAGES, RunRecords, branching_totals, load_run, series


def headline_rows(run: RunRecords) -> list[tuple[str, list[str]]]:
    """Returns (stage, cells): per level accuracy with its 95 % interval, and mean response tokens."""
    rows = []
    for name, label in STAGES.items():
        if name in run.evaluations:
            levels = run.evaluations[name]["levels"]
            rows.append((label, [_cell(levels[level]) if level in levels else "-" for level in LEVELS]))
    return rows


def branching_sentence(run: RunRecords) -> str:
    """Returns how many leaves were branches and how many tokens were shared instead of computed again."""
    t = branching_totals(run.metrics)
    if not t["leaves"]:
        return "No rollouts yet."
    total = t["shared"] + t["computed"]
    return (
        f"{t['branches']:,.0f} of {t['leaves']:,.0f} leaves are branches ({t['branches'] / t['leaves']:.0%}), each at a "
        f"validated high-entropy window; {t['shared']:,.0f} of {total:,.0f} tokens ({t['shared'] / total:.0%}), "
        "prompts included, were shared instead of computed again."
    )


def overlap_sentence(run: RunRecords) -> str:
    """Returns how much of the sampling ran while the learner learned, and where an iteration's time went."""
    seconds = {name: sum(series(run.metrics, f"time/{name}")[1]) for name in ("sample", "wait", "learn", "push", "step")}
    if not seconds["step"] or not seconds["sample"]:
        return "No overlap of sampling and learning measured yet."
    hidden = max(0.0, 1 - seconds["wait"] / seconds["sample"])
    return (
        f"AEPO sampled for {seconds['sample']:,.0f} s, {hidden:.0%} of them while the learner learned; it learned for "
        f"{seconds['learn']:,.0f} s, waited {seconds['wait']:,.0f} s for rollouts and {seconds['push']:,.0f} s for pushing "
        f"weights, of {seconds['step']:,.0f} s in all."
    )


def problems_note(run: RunRecords) -> str:
    """Returns what the table was measured on."""
    measured: dict[str, list[str]] = {}  # stages by what they were measured on: one entry, unless the config changed
    for stage, evaluation in run.evaluations.items():
        counts = ", ".join(f"{level['problems']} {name}" for name, level in evaluation["levels"].items())
        note = f"{evaluation['split']} split, {counts} problems, temperature {evaluation['temperature']}"
        measured.setdefault(note, []).append(STAGES[stage])
    if not measured:
        return "Not yet measured."
    if len(measured) == 1:
        return f"{next(iter(measured))}; 95 % intervals."
    return "; ".join(f"{', '.join(stages)}: {note}" for note, stages in measured.items()) + "; 95 % intervals."


def console_table(folder: Path) -> str:
    """Returns the table of a run as text, with branching and the time of every stage below it."""
    run = load_run(folder)
    lines = [f"{'':12}" + "".join(f"{level:>32}" for level in LEVELS)]
    lines += [f"{label:12}" + "".join(f"{cell:>32}" for cell in cells) for label, cells in headline_rows(run)]
    lines += [problems_note(run), branching_sentence(run), overlap_sentence(run)]
    lines += [f"{s['name']:24}{s['seconds']:8.0f} s{s['tokens']:12,d} tokens" for s in run.stages]
    return "\n".join(lines)


def _cell(level: dict) -> str:
    low, high = level["interval"]
    return f"{level['accuracy']:.1%} [{low:.1%}, {high:.1%}] {level['mean_tokens']:.1f} tok"
