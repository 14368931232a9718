"""Which problems the cold start learns from, and which trace of each: as long as the problem is hard.

method.md section 4, steps 2 and 3 (the paper's section 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Candidate:
    """A problem with its measured pass rate and the lengths (tokens) of its teacher's traces."""

    problem_id: str
    source: str
    pass_rate: float
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A problem kept: which candidate, which of its traces, and the length that was aimed at."""

    candidate: int
    trace: int
    target: float


def length_anchors(candidates: Sequence[Candidate]) -> dict[str, tuple[float, float]]:
    """Returns L(0) and L(1) per source: the median trace length, in tokens, at pass rate 0 and at pass rate 1.

    A source without a problem at exactly 0 (or 1) takes the lowest (highest) pass rate it has.
    """
    anchors = {}
    for source in sorted({c.source for c in candidates}):
        mine = [c for c in candidates if c.source == source]
        ends = min(c.pass_rate for c in mine), max(c.pass_rate for c in mine)
        low, high = (float(np.median([length for c in mine if c.pass_rate == end for length in c.lengths])) for end in ends)
        anchors[source] = (low, high)
    return anchors


def target_length(pass_rate: Float[np.ndarray, "N"] | float, anchors: tuple[float, float]) -> Float[np.ndarray, "N"] | float:
    """Returns L_target(p) = (1 - p) L(0) + p L(1), in tokens."""
    at_0, at_1 = anchors
    return (1 - pass_rate) * at_0 + pass_rate * at_1


def nearest_trace(lengths: Sequence[int], target: float) -> int:
    """Returns the index of the trace whose length is nearest to `target` (the shorter one if two are as near)."""
    return min(range(len(lengths)), key=lambda i: (abs(lengths[i] - target), lengths[i], i))


def uniform_over_brackets(pass_rates: Float[np.ndarray, "N"], count: int, seed: int) -> Int[np.ndarray, "K"]:
    """Returns indices of `count` problems spread as evenly over the distinct pass rates as their numbers allow.

    A bracket too small for its share gives all it has and the others share the rest. Sorted; all of them if N <= count.
    """
    rng = np.random.default_rng(seed)
    brackets = [rng.permutation(np.flatnonzero(pass_rates == rate)) for rate in np.unique(pass_rates)]
    brackets.sort(key=len)
    chosen, left = [], min(count, len(pass_rates))
    for position, bracket in enumerate(brackets):
        share = left // (len(brackets) - position)
        taken = bracket[:share]
        chosen.append(taken)
        left -= len(taken)
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def curate(candidates: Sequence[Candidate], count: int, seed: int) -> list[Choice]:
    """Chooses `count` problems uniformly over pass-rate brackets, and of each the trace nearest to its target length.

    Raises:
      ValueError: a candidate has no trace.
    """
    for candidate in candidates:
        if not candidate.lengths:
            raise ValueError(f"problem {candidate.problem_id} has no teacher response; give one or leave it out")
    anchors = length_anchors(candidates)
    picked = uniform_over_brackets(np.array([c.pass_rate for c in candidates]), count, seed)
    choices = []
    for index in picked.tolist():
        candidate = candidates[index]
        target = float(target_length(candidate.pass_rate, anchors[candidate.source]))
        choices.append(Choice(index, nearest_trace(candidate.lengths, target), target))
    return choices


def summary(candidates: Sequence[Candidate], choices: Sequence[Choice]) -> dict:
    """Returns what the report draws: lengths per pass-rate bracket, and length against difficulty, before and after.

    Lengths are in tokens; "before" takes the mean over all traces of all problems, "after" the traces that were kept.
    The correlations are Pearson's between trace length and 1 - pass rate.
    """
    rates = np.array([c.pass_rate for c in candidates])
    before = np.array([np.mean(c.lengths) for c in candidates])
    kept = np.array([c.candidate for c in choices], int)
    after = np.array([candidates[c.candidate].lengths[c.trace] for c in choices], float)
    brackets = []
    for rate in np.unique(rates):
        inside = rates[kept] == rate
        brackets.append(
            {
                "pass_rate": float(rate),
                "problems": int((rates == rate).sum()),
                "selected": int(inside.sum()),
                "length_before": float(before[rates == rate].mean()),
                "length_after": float(after[inside].mean()) if inside.any() else None,
            }
        )
    all_lengths = np.array([length for c in candidates for length in c.lengths], float)
    all_rates = np.array([c.pass_rate for c in candidates for _ in c.lengths])
    return {
        "brackets": brackets,
        "lengths": {s: {"at_0": a, "at_1": b} for s, (a, b) in length_anchors(candidates).items()},
        "correlation_before": _correlation(1 - all_rates, all_lengths),
        "correlation_after": _correlation(1 - rates[kept], after),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
