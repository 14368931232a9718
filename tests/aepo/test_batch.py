"""The learner's segments against the definitions, on random trees that no model drew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.aepo.batch import inside_windows, leaf_extras
from ares_jax.aepo.scoring import ScoredGroup
from ares_jax.aepo.state import initial_state
from ares_jax.config import default_config
from ares_jax.sampling.trajectory import RolloutGroup, Trajectory
from data_pipeline.prompts import Prompt
from tests.aepo import oracle

PROMPT = Prompt(
    "p", "s", "easy", "?", "1", (), np.arange(3, dtype=np.int32), np.zeros((0, 1176), np.float32),
    np.zeros((0, 3), np.int32), np.zeros((3, 3), np.int32), 0,
)  # fmt: skip


def random_group(rng):
    roots = int(rng.integers(1, 4))
    shapes = [(int(n), -1, 0) for n in rng.integers(1, 12, roots)]
    for _ in range(int(rng.integers(0, 4))):
        parent = int(rng.integers(roots))
        if shapes[parent][0] > 1:
            start = int(rng.integers(1, shapes[parent][0]))
            shapes.append((start + int(rng.integers(1, 9)), parent, start))
    leaves = tuple(
        Trajectory(
            rng.integers(0, 9, n), -rng.random(n), rng.random(n), rng.random(n), rng.random(n) < 0.2,
            np.zeros(n, int), parent, start, "stop",
        )
        for n, parent, start in shapes
    )  # fmt: skip
    rewards = rng.normal(size=len(leaves)) if rng.random() < 0.7 else np.full(len(leaves), 0.3)
    correct = rng.random(len(leaves)) < 0.5
    windows = np.array([leaf.window_mask.sum() for leaf in leaves])
    return ScoredGroup(PROMPT, RolloutGroup("p", leaves, 3, 0, 0), int(rng.integers(3)), correct, windows, rewards)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(["token", "seq"]), st.booleans(), st.booleans(), st.sampled_from([1, 4, 8]),
    st.sampled_from(["grpo", "rloo"]), st.sampled_from(["subtree", "leaf"]),
)  # fmt: skip
def test_segments(seed, reduction, dynamic, centred, window, baseline, tree):
    rng = np.random.default_rng(seed)
    aepo, levels = default_config().aepo, (0.0, 1.0, 2.5)
    aepo.reduction, aepo.kl.dynamic, aepo.window, aepo.entropy_bonus = reduction, dynamic, window, 0.2
    aepo.update(entropy_bonus_levels=levels, entropy_bonus_centred=centred, baseline=baseline, tree=tree)
    groups = [random_group(rng) for _ in range(int(rng.integers(1, 4)))]
    state = initial_state(aepo)._replace(tau_high=np.array(0.4), kappa=np.array([0.1, 0.2, 0.3]))
    extras = [x for group in leaf_extras(groups, state, aepo) for x in group]

    leaves = [(g, leaf) for g in groups for leaf in g.group.leaves]
    expected = []
    for g in groups:
        values = oracle.advantages(g.rewards, [0] * len(g.rewards), baseline)
        shared = tree == "subtree"  # otherwise every leaf is a root of its own
        shapes = [(len(x.token_ids), *((x.parent, x.branch_position) if shared else (-1, 0))) for x in g.group.leaves]
        expected += list(zip(*oracle.subtree_advantages(*zip(*shapes, strict=True), values), strict=True))
    tokens = sum(int(own.sum()) for _, own in expected)

    def first_term(g, leaf, t):
        phi = np.log1p(max(0, leaf.window_means[t] - 0.4)) if leaf.window_mask[t] else 0
        return 0.2 * levels[g.difficulty] * phi

    def weight_of(own):
        return 1 / tokens if reduction == "token" else 1 / own.sum() / len(leaves)

    b = sum(
        weight_of(own) * first_term(*leaf, t)
        for leaf, (_, own) in zip(leaves, expected, strict=True)
        for t in np.flatnonzero(own)
    )  # fmt: skip
    for got, (g, leaf), (values, own) in zip(extras, leaves, expected, strict=True):
        for t in range(len(own)):
            inside = any(leaf.window_mask[max(0, t - window + 1) : t + 1])
            bonus, weight = first_term(g, leaf, t) - centred * b, weight_of(own)
            beta = state.kappa[g.difficulty] * (0.5 if inside and dynamic else 1)
            mine = [got[k][t] for k in ("weight", "advantage", "old_log_prob", "kl_weight", "bucket", "in_window")]
            truth = [weight, values[t] + bonus, leaf.log_probs[t], beta, g.difficulty + 1, inside]
            np.testing.assert_allclose(mine, np.array(truth) if own[t] else 0, atol=1e-6)
    np.testing.assert_allclose(sum(x["weight"].sum() for x in extras), 1, atol=1e-5)


@pytest.mark.parametrize("length", range(10))
def test_a_window_longer_than_the_response(length):
    starts = np.zeros(length, bool)
    starts[:1] = True
    assert inside_windows(starts, 8).tolist() == [t < 8 for t in range(length)]
