"""Every formula against the slow version written from method.md, on random trees, masks and buckets."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from ares_jax.aepo import advantage, difficulty, kl, loss, reward, scoring, windows
from ares_jax.aepo.state import initial_state
from ares_jax.config import default_config
from ares_jax.sampling.rollout_tree import Trajectory, tree_of
from tests.aepo import oracle

many = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn_tree(masks, parents, starts):
    """Returns a tree of leaves with these validated windows; a window is one token long, so none lies across a branch."""
    zeros = [np.zeros(len(m)) for m in masks]
    leaves = [Trajectory(z, z, z, z, m, z, p, s, "stop") for m, z, p, s in zip(masks, zeros, parents, starts, strict=True)]
    return tree_of("p", leaves, prompt_tokens=3, window=1)


def random_tree(rng):
    """Roots first, then leaves that branch from any earlier one; the first token of a branch lies inside its parent."""
    roots = int(rng.integers(1, 4))
    lengths = rng.integers(1, 12, roots).tolist()
    parents, starts = [-1] * roots, [0] * roots
    for _ in range(int(rng.integers(0, 6))):
        parent = int(rng.integers(len(lengths)))
        if lengths[parent] > 1:
            start = int(rng.integers(1, lengths[parent]))
            parents.append(parent)
            starts.append(start)
            lengths.append(start + int(rng.integers(1, 9)))
    return lengths, parents, starts


@many
@given(seeds)
def test_subtree_advantages(seed):
    rng = np.random.default_rng(seed)
    lengths, parents, starts = random_tree(rng)
    # A branch below its parent's own branch point hangs from the grandparent there: keep starts inside the own part.
    starts = [max(s, starts[p] + 1) if p >= 0 else 0 for s, p in zip(starts, parents, strict=True)]
    lengths = [max(n, s + 1) for n, s in zip(lengths, starts, strict=True)]
    values = rng.normal(size=len(lengths))
    mine, weights = advantage.tree_advantages(values, parents, starts, lengths, first_roots=1, tree="subtree")
    expected, who = oracle.subtree_advantages(lengths, parents, starts, values - values.mean())
    for a, b, o, w in zip(mine, expected, weights, who, strict=True):
        np.testing.assert_allclose(a, np.where(w, b, 0), atol=1e-6)
        np.testing.assert_array_equal(o, w)


@many
@given(seeds, st.sampled_from(["grpo", "rloo"]))
def test_group_advantages(seed, baseline):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 7, 16)  # of any sizes, in any order; 16: compiled once
    kind = rng.integers(3)
    rewards = rng.normal(size=len(groups)) if kind == 0 else np.full(len(groups), float(kind - 1))  # all wrong, all right
    mine = advantage.group_normalized(rewards, groups, baseline=baseline)
    np.testing.assert_allclose(mine, oracle.advantages(rewards, groups, baseline), atol=1e-6)


@many
@given(seeds)
def test_rewards(seed):
    rng = np.random.default_rng(seed)
    n, target = rng.integers(0, 60, 20).astype(float), rng.uniform(0, 50, 20)
    d, correct, alpha = rng.integers(0, 3, 20), rng.random(20) < 0.5, rng.uniform(0, 2, 20)
    mine = reward.released_entropy_reward(n, target, d, correct, alpha)
    np.testing.assert_allclose(
        mine, [oracle.released(*x) for x in zip(n, target, d, correct, alpha, strict=True)], atol=1e-6
    )
    mean, variance = rng.uniform(0, 50, 20), rng.uniform(0, 9, 20)
    for most, excess in ((np.inf, 0.0), (rng.uniform(0, 2), rng.uniform(0, 1))):
        mine = reward.paper_entropy_reward(n, target, d, correct, mean, variance, 0.3, most, excess)
        rows = zip(n, target, d, correct, mean, variance, strict=True)
        np.testing.assert_allclose(mine, [oracle.paper(*x, 0.3, most, excess) for x in rows], atol=1e-6)
    lengths, limit, buffer = rng.integers(0, 40, 20), int(rng.integers(1, 40)), int(rng.integers(0, 20))
    mine = reward.overlong_penalty(lengths, limit, buffer)
    np.testing.assert_allclose(mine, [oracle.overlong(x, limit, buffer) for x in lengths], atol=1e-9)


@many
@given(seeds, st.sampled_from(["paper", "released", "none"]), st.sampled_from(["paper", "released"]))
def test_scores_of_a_whole_batch(seed, shaping, rule):
    """Buckets, targets of earlier batches or of this one, mean and variance: from leaves to rewards."""
    rng = np.random.default_rng(seed)
    aepo = default_config().aepo
    aepo.update(shaping=shaping, difficulty_rule=rule, overlong_buffer=int(rng.integers(0, 9)), overlong_penalty=0.7)
    targets = [None if rng.random() < 0.3 else float(rng.uniform(0, 9)) for _ in range(3)]
    state = initial_state(aepo)._replace(
        target=np.array([np.nan if t is None else t for t in targets]), alpha=rng.uniform(0, 2, 3)
    )
    trees, plain = [], []
    for _ in range(int(rng.integers(1, 7))):
        size = int(rng.integers(1, 9))
        right = [np.zeros(size, bool), np.ones(size, bool), rng.random(size) < 0.5][int(rng.integers(3))]
        masks = [rng.random(int(rng.integers(1, 25))) < rng.choice([0.0, 0.4]) for _ in range(size)]  # often no window
        half = len(masks[0]) // 2
        branches = int(rng.integers(0, size)) if half else 0
        parents, starts = [-1] * (size - branches) + [0] * branches, [0] * (size - branches) + [half] * branches
        masks = [np.concatenate([masks[0][:s], m]) if s else m for m, s in zip(masks, starts, strict=True)]
        tree = drawn_tree(masks, parents, starts)
        trees.append(replace(tree, correct=right))
        plain.append([(int(m.sum()), bool(r), len(m), p < 0) for m, r, p in zip(masks, right, parents, strict=True)])
    mine = scoring.score(trees, state, aepo, max_tokens=24)
    levels, expected = oracle.rewards(
        plain, targets, state.alpha, shaping, rule, scale=0.5, most=1.0, easy_excess=0.5, limit=24,
        buffer=aepo.overlong_buffer, penalty=0.7,
    )  # fmt: skip
    assert [s.difficulty for s in mine] == levels
    for s, values in zip(mine, expected, strict=True):
        np.testing.assert_allclose(s.rewards, values, atol=1e-6)


@many
@given(seeds, st.sampled_from([1, 4, 8]))
def test_validated_windows(seed, window):
    """From entropies and tokens, also of responses shorter than a window; what stands behind a response does not matter."""
    rng = np.random.default_rng(seed)
    length, vocabulary = int(rng.integers(0, 31)), {1, 4, 5}
    entropy, tokens, response = rng.exponential(size=30), rng.integers(0, 7, 30), np.arange(30) < length
    tau = float(rng.choice([0.0, 0.8, np.mean(entropy), np.inf]))
    means, complete = kernels.window_means(entropy[None], response[None], window)
    mine = windows.validated(np.asarray(means[0]), np.asarray(complete[0]), np.isin(tokens, list(vocabulary)), tau)
    assert mine[:length].tolist() == oracle.validated(entropy[:length], tokens, vocabulary, tau, window)
    assert not mine[length:].any()


def test_the_multiplier_is_bounded_where_nothing_varies():
    """Easy, wrong, 3 windows against a target of 1, mean 2, no variance: lambda would be 1e6; bounded at 1 it costs 2."""
    one = np.ones(1)
    value = reward.paper_entropy_reward(3 * one, one, np.zeros(1, int), one < 0, 2 * one, 0 * one, max_multiplier=1.0)
    np.testing.assert_allclose(value, [-2.0])


def test_released_reward_by_hand():
    """Easy, target 4: margin max(1, 0.6) = 1. Right with 4: 0. Right with 9: delta 5, huber(4, 2) = 3, 3 / 3 x 0.5 = 0.5.
    Wrong with 4: 0.6 x 0.5 x sat(0) = 0.15, the reward for nothing that method.md points out."""
    value = reward.released_entropy_reward(
        np.array([4.0, 9.0, 4.0]), np.array(4.0), np.zeros(3, int), np.array([True, True, False]), 0.5
    )
    np.testing.assert_allclose(value, [0.0, -0.5, 0.15], atol=1e-9)


@many
@given(seeds, st.sampled_from(["token", "seq"]))
def test_clipped_surrogate(seed, reduction):
    rng = np.random.default_rng(seed)
    log_p, old, advantages = rng.normal(-2, 2, (3, 4, 6))
    mask = rng.random((4, 6)) < rng.choice([0.0, 0.3, 1.0])
    value, metrics = loss.clipped_surrogate(
        log_p, old, advantages, mask, clip_low=0.2, clip_high=0.3, clip_dual=3.0, reduction=reduction
    )
    np.testing.assert_allclose(value, oracle.loss(log_p, old, advantages, mask, 0.2, 0.3, 3.0, reduction), atol=1e-6)
    assert all(0 <= float(m) <= 1 for m in metrics.values())


@many
@given(seeds, st.sampled_from(["k1", "abs", "mse", "k3"]))
def test_kl_and_its_weights(seed, estimator):
    rng = np.random.default_rng(seed)
    log_p, ref = rng.normal(-2, 3, (2, 30))
    np.testing.assert_allclose(kl.per_token_kl(log_p, ref, estimator), oracle.kl(log_p, ref, estimator), atol=1e-6)
    kappa, d, inside = rng.uniform(0, 1, 3), rng.integers(0, 3, 30), rng.random(30) < 0.5
    expected = [kappa[i] * 0.4 ** int(m) for i, m in zip(d, inside, strict=True)]
    np.testing.assert_allclose(kl.token_weights(kappa, d, inside, 0.4), expected, atol=1e-9)
    observed, target = rng.uniform(0, 1, 3), rng.uniform(0.01, 1, 3)
    mine = kl.updated_controller(kappa, observed, target, rate=0.1, minimum=0.01, maximum=0.5)
    np.testing.assert_allclose(mine, oracle.controller(kappa, observed, target, 0.1, 0.01, 0.5), atol=1e-9)


def test_a_bucket_without_tokens_keeps_its_weight():
    kappa = kl.updated_controller(
        np.array([0.1, 0.2, 0.3]), np.array([np.nan, 0.05, 0.1]), np.full(3, 0.05), rate=0.1, minimum=0.0, maximum=1.0
    )
    np.testing.assert_allclose(kappa, [0.1, 0.2, 0.33])


@many
@given(seeds, st.sampled_from(["trajectory", "window_median"]))
def test_thresholds(seed, definition):
    rng = np.random.default_rng(seed)
    trajectories = [rng.exponential(size=rng.integers(4, 40)) for _ in range(5)]
    mine = windows.batch_threshold(trajectories, definition=definition, quantile=0.95, window=4)
    np.testing.assert_allclose(mine, oracle.tau(trajectories, definition, 0.95, 4), atol=1e-9)


def test_empty_trajectories_give_no_threshold():
    assert np.isnan(windows.batch_threshold([np.zeros(0)], definition="trajectory", quantile=0.95, window=4))
    assert np.isnan(windows.batch_threshold([np.zeros(2)], definition="window_median", quantile=0.95, window=4))


@pytest.mark.parametrize("group", range(1, 33))
def test_buckets(group):
    for rule in ("paper", "released"):
        mine = difficulty.bucket(np.arange(group + 1), group, rule)
        assert mine.tolist() == [oracle.bucket(k, group, rule) for k in range(group + 1)]
    assert [int(difficulty.bucket(k, 8)) for k in range(9)] == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert [int(difficulty.bucket(k, 8, "released")) for k in range(9)] == [2, 2, 2, 1, 1, 1, 0, 0, 0]
