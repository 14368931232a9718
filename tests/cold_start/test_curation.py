import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ares_jax.cold_start.curation import (
    Candidate,
    curate,
    length_anchors,
    nearest_trace,
    summary,
    target_length,
    uniform_over_brackets,
)  # fmt: skip


def test_target_length_is_the_line_between_the_anchors():
    """Worked by hand: medians 80 at pass rate 0 and 20 at 1; p = 0.25 aims at 0.75 * 80 + 0.25 * 20 = 65 tokens."""
    candidates = [
        Candidate("a", "s", 0.0, (70, 80, 200)), Candidate("b", "s", 1.0, (10, 20, 30)),
        Candidate("c", "s", 0.25, (20, 61, 90))
    ]  # fmt: skip
    anchors = length_anchors(candidates)
    assert anchors == {"s": (80.0, 20.0)}
    assert target_length(0.25, anchors["s"]) == 65.0
    choices = {c.candidate: c for c in curate(candidates, 3, seed=0)}
    assert choices[2].trace == 1 and choices[2].target == 65.0
    assert choices[0].trace == 1 and choices[1].trace == 1


def test_sources_have_their_own_anchors():
    candidates = [Candidate("a", "s", 0.0, (100,)), Candidate("b", "t", 0.0, (10,)), Candidate("c", "t", 0.5, (4,))]
    assert length_anchors(candidates) == {"s": (100.0, 100.0), "t": (10.0, 4.0)}


def test_nearest_trace_prefers_the_shorter_of_two():
    assert nearest_trace([10, 30, 20], 25.0) == 2


@given(st.lists(st.integers(0, 8), min_size=1, max_size=200), st.integers(0, 250), st.integers(0, 5))
def test_selection_is_as_even_as_the_brackets_allow(rates, count, seed):
    rates = np.array(rates) / 8
    picked = uniform_over_brackets(rates, count, seed)
    assert len(picked) == len(set(picked.tolist())) == min(count, len(rates))
    taken = {rate: int((rates[picked] == rate).sum()) for rate in np.unique(rates)}
    for rate, number in taken.items():  # a bracket gives less than another only if it has no more, or by rounding
        if number < (rates == rate).sum():
            assert number >= max(taken.values()) - 1


def test_summary_numbers():
    candidates = [Candidate("a", "s", 0.0, (10, 90)), Candidate("b", "s", 1.0, (10, 90)), Candidate("c", "s", 0.0, (8, 92))]
    result = summary(candidates, curate(candidates, 3, seed=0))
    assert [b["problems"] for b in result["brackets"]] == [2, 1]
    assert [b["selected"] for b in result["brackets"]] == [2, 1]
    assert result["correlation_before"] == pytest.approx(0.0, abs=1e-9)


def test_a_problem_without_a_trace_is_named():
    with pytest.raises(ValueError, match="problem lost has no teacher response"):
        curate([Candidate("lost", "s", 0.0, ())], 1, seed=0)
