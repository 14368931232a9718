"""Estimators of the gradient on trees: against their definition, and against exact gradients of small decision processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.aepo.advantage import tree_advantages
from tests.aepo import decision_process, oracle
from tests.aepo.decision_process import LENGTH, STATES, causal, post_hoc

FORKS = st.sets(st.sampled_from([state for state in STATES if state]))


@st.composite
def trees(draw):
    """Parents, starts, lengths, first roots: branches of branches, several at a place, and at the place of their parent."""
    roots, count = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    parents, starts = [-1] * roots, [0] * roots
    lengths = [draw(st.integers(1, 9)) for _ in range(roots)]
    for leaf in range(roots, roots + count):
        parents.append(draw(st.integers(-1, leaf - 1)))
        starts.append(draw(st.integers(1, lengths[parents[leaf]])) if parents[leaf] >= 0 else 0)
        lengths.append(starts[leaf] + draw(st.integers(1, 5)))
    return parents, starts, lengths, draw(st.integers(1, roots))


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(0, 2**16), st.sampled_from(["any", "right", "wrong"]))
def test_split_is_its_definition(tree, seed, kind):
    parents, starts, lengths, first_roots = tree
    rewards = {"any": np.random.default_rng(seed).normal(size=len(parents)), "right": np.ones(len(parents)),
               "wrong": np.zeros(len(parents))}[kind]  # fmt: skip
    found = tree_advantages(rewards, parents, starts, lengths, first_roots=first_roots, tree="split")
    for mine, expected in zip(found, oracle.split_advantages(rewards, *tree), strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=1e-6)
    roots = parents.count(-1)
    # At each depth the weights of a tree's tokens that are drawn, or ended before, sum to 1: no path counts twice.
    assert sum(w[0] for w, parent in zip(found[1], parents, strict=True) if parent < 0) == pytest.approx(roots)


def expectation(process, enumerated, tree, roots):
    """Returns the expected estimate, and the gradient that it should be, by the logits of `STATES`."""
    estimate, drawn, number = np.zeros(len(STATES)), np.zeros(len(STATES)), 0.0
    for outcome in enumerated:
        estimate += outcome.probability * contribution(process, outcome, tree, roots)
        drawn += outcome.probability * outcome.drawn_by_children()
        number += outcome.probability * outcome.parents.count(-1)
    exact = number * process.gradient()
    if tree == "local":  # children add half of the gradient of the value where they were drawn, and nothing else
        exact = exact + 0.5 * drawn * np.array([process.slope(state) for state in STATES])
    return estimate, exact


def contribution(process, outcome, tree, roots):
    rewards = np.array([process.reward[path] for path in outcome.paths])
    found = tree_advantages(rewards, outcome.parents, outcome.starts, [LENGTH] * len(rewards), first_roots=roots, tree=tree)
    return outcome.contribution(process, *found)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), FORKS, st.sampled_from(["split", "local"]))
def test_sound_estimators_on_causal_forks_have_no_bias(seed, forks, tree):
    """Of any policy and reward, exactly: all trees are enumerated. Children fork too, and top-ups fill the group."""
    process = decision_process.process(seed)
    estimate, exact = expectation(process, causal(process, forks, roots=2, leaves=4, most=1), tree, 2)
    np.testing.assert_allclose(estimate, exact, atol=1e-6)


def last_zero(path):
    """A choice that sees the future: the place before the last 0, where the parent will go wrong."""
    return max((n for n in range(1, LENGTH) if path[n] == 0), default=0)


CAUSAL = {(0,), (1,), (0, 1), (1, 0)}
SOUND = [("split", "causal"), ("local", "causal"), ("local", "post-hoc")]
BIASED = [("split", "post-hoc"), ("subtree", "post-hoc"), ("leaf", "post-hoc")]


@pytest.mark.parametrize("tree, forks", SOUND + BIASED)
def test_two_hundred_thousand_groups(tree, forks):
    """A sound estimator is below 4 standard errors of the exact gradient; the others are far from 0 where that is 0."""
    process, rng = decision_process.process(3), np.random.default_rng(0)
    found = causal(process, CAUSAL, roots=2, leaves=4, most=1) if forks == "causal" else None
    outcomes = list(found or post_hoc(process, last_zero, roots=2, leaves=4))
    estimates = np.array([contribution(process, outcome, tree, 2) for outcome in outcomes])
    chances = np.array([outcome.probability for outcome in outcomes])
    assert chances.sum() == pytest.approx(1)
    counts = rng.multinomial(200_000, chances / chances.sum())
    mean = counts @ estimates / 200_000
    error = np.sqrt((counts @ estimates**2 / 200_000 - mean**2) / 200_000)
    exact = expectation(process, outcomes, tree, 2)[1]
    bias = np.abs(mean - exact) / (error + 1e-9)
    if (tree, forks) in SOUND:
        assert (bias < 4).all() and (error < 0.01).all()
        np.testing.assert_allclose(chances @ estimates, exact, atol=1e-6)
    else:
        assert bias[exact == 0].max() > 8


def test_local_by_hand():
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0]  # two first roots, a top-up, a child of root 0 at 2, its child at 3
    advantages, weights = tree_advantages(
        rewards, [-1, -1, -1, 0, 3], [0, 0, 0, 2, 3], [3, 2, 2, 4, 5], first_roots=2, tree="local"
    )
    expected = [[1.0] * 3, [-1.0] * 2, [0.5] * 2, [0, 0, 0.125, 0.125], [0, 0, 0, -0.375, -0.375]]
    for a, w, numbers in zip(advantages, weights, expected, strict=True):
        np.testing.assert_allclose(a, numbers, atol=1e-6)
        np.testing.assert_array_equal(w, np.array(numbers) != 0)


def test_the_averages_of_the_paper_stay():
    rewards = [1.0, 0.0, 0.0, 0.0]
    tree = dict(parents=[-1, -1, 0, 0], branch_positions=[0, 0, 1, 2], lengths=[3, 1, 2, 4])
    advantages, weights = tree_advantages(rewards, **tree, first_roots=2, tree="subtree")
    np.testing.assert_allclose(advantages[0], [1 / 12, 0.25, 0.75], atol=1e-6)
    assert [w.tolist() for w in weights] == [[1, 1, 1], [1], [0, 1], [0, 0, 1, 1]]
    advantages, weights = tree_advantages(rewards, **tree, first_roots=2, tree="leaf")
    np.testing.assert_allclose(advantages[3], [-0.25] * 4, atol=1e-6)
    assert all(w.all() for w in weights)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tree": "trunk"}, "tree='trunk' is not one of split, local, subtree, leaf"),
        ({"first_roots": 3}, "first_roots=3, but the tree has 2 roots; give 1 to 2"),
        ({"parents": [-1, -1, 2]}, "leaf 2 of 3 tokens cannot begin at 1 of leaf 2"),
        ({"branch_positions": [0, 0, 0]}, "leaf 2 of 3 tokens cannot begin at 0 of leaf 0"),
        ({"branch_positions": [0, 1, 1]}, "leaf 1 of 2 tokens cannot begin at 1 of leaf -1"),
        ({"branch_positions": [0, 0, 3]}, "leaf 2 begins at 3, but its parent 0 has 2 tokens"),
    ],
)
def test_what_is_no_tree_is_refused(changes, said):
    good = dict(parents=[-1, -1, 0], branch_positions=[0, 0, 1], lengths=[2, 2, 3], first_roots=2, tree="split")
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        tree_advantages([1.0, 0.0, 1.0], **(good | changes))
