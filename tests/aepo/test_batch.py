"""The learner's segments against the definitions, on random trees that no model drew."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.aepo.batch import inside_windows, learner_segments, unshared
from ares_jax.aepo.state import initial_state
from ares_jax.config import default_config
from ares_jax.sampling.rollout_tree import Trajectory, tree_of
from data_pipeline.prompts import Prompt
from tests.aepo import oracle

PROMPT = Prompt(
    "p", "s", "easy", "?", "1", np.arange(3, dtype=np.int32), np.zeros((0, 1176), np.float32),
    np.zeros((0, 3), np.int32), np.zeros((3, 3), np.int32), 0,
)  # fmt: skip


def random_group(rng, window):
    roots = int(rng.integers(1, 4))
    shapes = [(int(n), -1, 0) for n in rng.integers(1, 12, roots)]
    for _ in range(int(rng.integers(0, 4))):
        parent = int(rng.integers(roots))
        if shapes[parent][0] > 1:
            start = int(rng.integers(1, shapes[parent][0]))
            shapes.append((start + int(rng.integers(1, 9)), parent, start))
    leaves: list[Trajectory] = []
    for n, parent, start in shapes:
        columns = rng.integers(0, 9, n), -rng.random(n), rng.random(n), rng.random(n), rng.random(n) < 0.2, np.zeros(n, int)
        if parent >= 0:  # what it shares with its parent is the same, but for windows that reach over the branch point
            for kind, (mine, others) in enumerate(zip(columns, vars(leaves[parent]).values(), strict=False)):
                shared = start if kind < 3 else max(0, start - window + 1)
                mine[:shared] = others[:shared]
        leaves.append(Trajectory(*columns, parent, start, "stop"))
    tree = tree_of("p", leaves, prompt_tokens=3, window=window, first_roots=int(rng.integers(1, roots + 1)))
    rewards = rng.normal(size=len(leaves)) if rng.random() < 0.7 else np.full(len(leaves), float(rng.integers(2)))
    return replace(
        tree, prompt=PROMPT, difficulty=int(rng.integers(3)), correct=rng.random(len(leaves)) < 0.5, rewards=rewards
    )


def expected_advantages(tree, aepo):
    """Advantages and weights of each leaf by the definitions, and the leaves."""
    leaves = unshared(tree).leaves if aepo.tree == "leaf" else tree.leaves
    shape = [x.parent for x in leaves], [x.branch_position for x in leaves], [len(x.token_ids) for x in leaves]
    if aepo.tree in ("split", "local"):
        of = {"split": oracle.split_advantages, "local": oracle.local_advantages}[aepo.tree]
        values, weights = of(tree.rewards, *shape, tree.first_roots)
    else:
        values, weights = oracle.subtree_advantages(shape[2], *shape[:2], tree.rewards - tree.rewards.mean())
    return leaves, values, [np.asarray(w, float) for w in weights]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(["token", "seq"]), st.booleans(), st.booleans(), st.sampled_from([1, 4, 8]),
    st.sampled_from(["batch", "group", "none"]), st.sampled_from(["split", "local", "subtree", "leaf"]),
)  # fmt: skip
def test_segments(seed, reduction, dynamic, centred, window, scale, tree):
    rng = np.random.default_rng(seed)
    aepo, levels = default_config().aepo, (0.0, 1.0, 2.5)
    aepo.reduction, aepo.kl.dynamic, aepo.window, aepo.entropy_bonus = reduction, dynamic, window, 0.2
    aepo.update(entropy_bonus_levels=levels, entropy_bonus_centred=centred, scale=scale, tree=tree)
    trees = [random_group(rng, window) for _ in range(int(rng.integers(1, 4)))]
    state = initial_state(aepo)._replace(tau_high=np.array(0.4), kappa=np.array([0.1, 0.2, 0.3]))
    segments = learner_segments(trees, state, aepo)

    parts = [expected_advantages(t, aepo) for t in trees]
    share = sum(w.sum() if reduction == "token" else w[-1] for _, _, weights in parts for w in weights)
    roots = np.concatenate([[c for c, leaf in zip(t.correct, t.leaves, strict=True) if leaf.parent < 0] for t in trees])
    expected = []
    for t, (leaves, values, weights) in zip(trees, parts, strict=True):
        std = np.std(t.rewards, ddof=1) + 1e-6 if len(t.rewards) > 1 else 1.0
        divisor = {"batch": max(np.std(roots), 0.1), "group": std, "none": 1.0}[scale]
        rows = []
        for k in range(len(leaves)) if tree == "leaf" else t.walk:  # as the tokens stand
            leaf, value, weight = leaves[k], values[k], weights[k]
            n = len(leaf.token_ids)
            for i in range(leaf.branch_position, n):
                inside = any(leaf.window_mask[max(0, i - window + 1) : i + 1])
                phi = np.log1p(max(0, leaf.window_means[i] - 0.4)) if leaf.window_mask[i] else 0
                beta = state.kappa[t.difficulty] * (0.5 if inside and dynamic else 1)
                w = weight[i] / share if reduction == "token" else weight[i] / n / share
                rows.append([w, value[i] / divisor, 0.2 * levels[t.difficulty] * phi, leaf.log_probs[i], beta, inside])
        expected.append(np.array(rows, float))
    every = np.concatenate(expected)
    base = centred * (every[:, 0] @ every[:, 2]) / every[:, 0].sum()
    for t, segment, rows in zip(trees, segments, expected, strict=True):
        got = {name: value[3:] for name, value in segment.token_fields.items()}  # behind the prompt
        for name, truth in zip(("weight", "old_log_prob", "kl_weight", "in_window"), rows.T[[0, 3, 4, 5]], strict=True):
            np.testing.assert_allclose(got[name], truth, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(got["advantage"], rows[:, 1] + rows[:, 2] - base, rtol=1e-5, atol=1e-5)
        assert got["loss_mask"].all() and not segment.token_fields["loss_mask"][:3].any()
        assert (got["difficulty"] == t.difficulty).all()
    if reduction == "token":
        np.testing.assert_allclose(sum(s.token_fields["weight"].sum() for s in segments), 1, atol=1e-5)


def test_a_branch_is_divided_by_its_whole_path():
    """A branch of 10 shared tokens and 2 of its own: each of the two is a 12th of a sequence, not a half."""
    aepo = default_config().aepo
    aepo.update(reduction="seq", tree="local", scale="none")
    zeros = [np.zeros(n) for n in (12, 12, 12)]
    starts = (0, 0, 10)
    leaves = [Trajectory(z, z, z, z, z > 0, z, -1 if not s else 0, s, "stop") for z, s in zip(zeros, starts, strict=True)]
    tree = tree_of("p", leaves, prompt_tokens=3, window=4, first_roots=2)
    tree = replace(tree, prompt=PROMPT, difficulty=0, correct=np.ones(3, bool), rewards=np.ones(3))
    (segment,) = learner_segments([tree], initial_state(aepo), aepo)
    np.testing.assert_allclose(segment.token_fields["weight"][3:], 1 / 12 / 3)


@pytest.mark.parametrize("length", range(10))
def test_a_window_longer_than_the_response(length):
    starts = np.zeros(length, bool)
    starts[:1] = True
    assert inside_windows(starts, 8).tolist() == [t < 8 for t in range(length)]
