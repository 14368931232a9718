"""The learner's step on real trees of the tiny model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ares_jax.aepo.batch import learner_segments
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.scoring import grade, score
from ares_jax.aepo.state import initial_state
from ares_jax.config import default_config
from ares_jax.params import to_flat
from ares_jax.sampling.requests import rollout_request
from ares_jax.training import initial_state as train_state
from ares_jax.training import make_optimizer
from ares_jax.training.log_probs import token_statistics
from benchmarks.random_trees import leaf_segments
from data_pipeline.packing import pack
from tests import digits
from tests.aepo import oracle

BANNED = digits.banned()


@pytest.fixture(scope="module")
def scored():
    prompts = digits.prompts(4)
    requests = [
        rollout_request(p, seed=i, group_size=4, root_leaves=2, max_branches_per_sequence=2, tau_high=5.4, max_new_tokens=12)
        for i, p in enumerate(prompts)
    ]
    groups = digits.engine().generate(requests)
    rng = np.random.default_rng(0)
    out = []
    for prompt, group in zip(prompts, groups, strict=True):
        out.append(replace(group, prompt=prompt, difficulty=1, correct=rng.random(4) < 0.5, rewards=rng.normal(size=4)))
    assert sum(s.branches for s in out) > 2
    return out


def aepo(**changes):
    config = default_config()
    with config.unlocked():
        config.aepo.window = 3
        config.aepo.update(changes)
    return config


def step(scored, config, *, rows, row_tokens=96, learning_rate=None, trees=True):
    """Returns the parameters after one update, and the segments' batches."""
    state = initial_state(config.aepo)._replace(tau_high=np.array(5.4))
    if trees:
        segments = learner_segments(scored, state, config.aepo)
    else:
        segments = leaf_segments(scored, state, config.aepo)
    batches = pack(segments, rows=rows, row_tokens=row_tokens, row_patches=48)
    # Plain descent where updates are compared: Adam's first step is the sign of the gradient, noise where it is near 0.
    adam = make_optimizer(config.optimizer, learning_rate=learning_rate or 0.0, steps=1)
    optimizer = adam if learning_rate else optax.sgd(1.0)
    learner = Learner(digits.model(), BANNED, optimizer, config.aepo, digits.placement(), temperature=1.0)
    params = jax.tree.map(lambda x: x.copy(), to_flat(digits.model()))
    after, metrics = learner.update(train_state(params, optimizer, digits.placement()), batches, to_flat(digits.model()))
    return after, metrics, batches


def gained(params, batches):
    statistics = jax.jit(token_statistics(digits.model(), jnp.array(BANNED)))
    total = 0.0
    for batch in batches:
        now, counted = np.asarray(statistics(params, batch)[0]), batch["loss_mask"]
        change = now[counted] - batch["old_log_prob"][counted]
        total += float(np.sum(batch["weight"][counted] * batch["advantage"][counted] * change))
    return total


def test_an_update_makes_good_leaves_likelier(scored):
    state, metrics, batches = step(scored, aepo(), rows=4, learning_rate=1e-4)
    assert gained(state.params, batches) > 0
    assert float(metrics["mismatch"]) / float(metrics["tokens"]) < 1e-5  # sampler and learner agree
    assert abs(sum(float(b["weight"].sum()) for b in batches) - 1) < 1e-5


TREES = [("split", 56), ("split", 160), ("local", 56), ("subtree", 56), ("subtree", 160), ("leaf", 96)]


@pytest.mark.parametrize("tree, row_tokens", TREES)
def test_a_tree_gives_the_gradient_of_its_leaves(scored, row_tokens, tree):
    """Shared prefixes computed once: the update of plain descent, which is the gradient, leaf by leaf and as trees."""
    leaves = step(scored, aepo(tree=tree), rows=16, trees=False)
    trees = step(scored, aepo(tree=tree), rows=16, row_tokens=row_tokens)
    for name in ("loss", "kl", "entropy", "tokens"):
        np.testing.assert_allclose(trees[1][name], leaves[1][name], rtol=1e-4, atol=1e-6)
    for name, value in to_flat(digits.model()).items():
        expected, got = leaves[0].params[name] - value, trees[0].params[name] - value
        np.testing.assert_allclose(got, expected, atol=1e-6 + 1e-4 * float(jnp.abs(expected).max()), err_msg=name)
    assert sum(int((b["segment_ids"] > 0).sum()) for b in trees[2]) < sum(
        int((b["segment_ids"] > 0).sum()) for b in leaves[2]
    )


@pytest.mark.parametrize("old", ["sampler", "recomputed"])
def test_micro_batches_add_up_to_the_batch(scored, old):
    config = aepo(old_log_probs=old, reduction="seq")
    one, many = step(scored, config, rows=16)[0], step(scored, config, rows=1)[0]
    moved = {name: one.params[name] - value for name, value in to_flat(digits.model()).items()}
    for name, value in many.params.items():
        np.testing.assert_allclose(value, one.params[name], atol=1e-5 + 1e-4 * float(jnp.abs(moved[name]).max()))


def test_the_ratio_is_to_the_policy_before_the_first_of_several_updates(scored):
    """Recomputed log-probs of then, not of now: with those the ratio would always be 1 and nothing ever clipped."""
    config = aepo(old_log_probs="recomputed", kl={"weight": 0.0})
    segments = learner_segments(scored, initial_state(config.aepo), config.aepo)
    batches = pack(segments, rows=16, row_tokens=96, row_patches=48)
    learner = Learner(digits.model(), BANNED, optax.sgd(100.0), config.aepo, digits.placement(), temperature=1.0)
    before = train_state(jax.tree.map(lambda x: x.copy(), to_flat(digits.model())), optax.sgd(100.0), digits.placement())
    old = learner.log_probs(before.params, batches)
    after, first = learner.update(before, batches, None, old)
    clipped = {name: learner.update(train_state(jax.tree.map(lambda x: x.copy(), after.params), optax.sgd(1.0),
                                                digits.placement()), batches, None, given)[1]
               for name, given in (("then", old), ("now", None))}  # fmt: skip
    assert int(first["clip_low"] + first["clip_high"]) == 0
    assert int(clipped["then"]["clip_low"] + clipped["then"]["clip_high"]) > 0
    assert int(clipped["now"]["clip_low"] + clipped["now"]["clip_high"]) == 0
    assert float(clipped["then"]["mismatch"]) == float(
        first["mismatch"]
    )  # of sampler and learner, whatever was learned since


def test_each_distinct_token_counts_once(scored):
    state = initial_state(aepo().aepo)
    distinct = sum(len(leaf.token_ids) - leaf.branch_position for s in scored for leaf in s.leaves)
    for tree, expected in (
        ("subtree", distinct),
        ("leaf", sum(len(leaf.token_ids) for s in scored for leaf in s.leaves)),
    ):
        segments = learner_segments(scored, state, aepo(tree=tree).aepo)
        assert sum(int(s.token_fields["loss_mask"].sum()) for s in segments) == expected


def test_a_gradient_that_is_not_finite_changes_nothing(scored):
    broken = [replace(s, rewards=np.array([np.nan, 0, 1, 0])) for s in scored]
    state, metrics, _ = step(broken, aepo(), rows=16)
    assert int(state.skipped) == 1
    for name, value in to_flat(digits.model()).items():
        np.testing.assert_array_equal(state.params[name], value)


def test_leaves_are_graded_one_by_one(scored):
    config = aepo(shaping="none").aepo
    right = {tuple(leaf.token_ids) for s in scored for leaf in s.leaves[::3]}  # the first and the last of four
    prompts = [s.prompt for s in scored]
    answers = {tuple(leaf.token_ids): s.prompt.answer for s in scored for leaf in s.leaves}

    def decode(ids):
        return f"<think></think>\\boxed{{{answers[tuple(ids)]}}}" if tuple(ids) in right else r"\boxed{none}"

    graded = grade(prompts, scored, decode, process=3)
    assert all(tree.formatted == tree.correct.sum() and tree.process == 3 for tree in graded)
    result = score(graded, initial_state(config), config, max_tokens=12)
    for s in result:
        assert s.correct.tolist() == [tuple(leaf.token_ids) in right for leaf in s.leaves]
        assert s.rewards.tolist() == s.correct.astype(float).tolist()
    assert {s.accuracy for s in result} >= {0.5} and result[0].difficulty == 1


def test_the_reference_may_live_on_the_host_or_not_at_all(scored):
    def update(reference):
        state = initial_state(aepo().aepo)._replace(tau_high=np.array(5.4))
        batches = pack(learner_segments(scored, state, aepo().aepo), rows=16, row_tokens=96, row_patches=48)
        learner = Learner(digits.model(), BANNED, optax.sgd(1.0), aepo().aepo, digits.placement(), temperature=1.0)
        params = jax.tree.map(lambda x: 0.9 * x, to_flat(digits.model()))
        return learner.update(train_state(params, optax.sgd(1.0), digits.placement()), batches, reference)

    device, on_device = update(to_flat(digits.model()))
    host, on_host = update(jax.device_get(to_flat(digits.model())))
    assert float(on_device["loss"]) == float(on_host["loss"]) and float(on_device["kl"].sum()) > 0
    assert all((host.params[name] == value).all() for name, value in device.params.items())
    absent = update(None)[1]
    assert "kl" not in absent and float(absent["loss"]) < float(on_device["loss"])


@pytest.fixture(scope="module")
def stirred(scored):
    """Returns a micro-batch whose numbers are random, also where no token counts, and the tokens' entropies."""
    (batch,) = pack(
        learner_segments(scored, initial_state(aepo().aepo), aepo().aepo), rows=16, row_tokens=96, row_patches=48
    )
    rng, shape = np.random.default_rng(1), batch["tokens"].shape
    log_probs, entropies = jax.jit(token_statistics(digits.model(), jnp.array(BANNED)))(to_flat(digits.model()), batch)
    batch |= {
        "old_log_prob": np.asarray(log_probs) + rng.normal(scale=0.8, size=shape), "advantage": rng.normal(size=shape),
        "weight": rng.random(shape) / 100, "kl_weight": rng.random(shape), "in_window": rng.random(shape) < 0.5,
    }  # fmt: skip
    batch = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in batch.items()}
    batch["difficulty"] = rng.integers(0, 3, shape).astype(np.int32)
    return batch, np.asarray(entropies)


@pytest.mark.parametrize("recomputed, estimator", [(False, "k3"), (False, "k1"), (True, "k3"), (True, "k1")])
def test_the_loss_and_its_sums_are_those_of_the_definitions(stirred, recomputed, estimator):
    batch, entropies = stirred
    config = aepo(old_log_probs="recomputed" if recomputed else "sampler", kl={"estimator": estimator}).aepo
    learner = Learner(digits.model(), BANNED, optax.sgd(0.0), config, digits.placement(), temperature=1.0)
    rng, params = np.random.default_rng(2), jax.tree.map(lambda x: x.copy(), to_flat(digits.model()))
    reference = {name: value * rng.normal(1, 0.5, value.shape) for name, value in list(params.items())[::2]}
    (log_probs,) = learner.log_probs(params, [batch])
    (of_reference,) = learner.log_probs({**params, **reference}, [batch])
    columns = {name: batch[name] for name in ("old_log_prob", "advantage", "weight", "kl_weight", "in_window")}
    columns["bucket"] = np.where(batch["loss_mask"], batch["difficulty"] + 1, 0)
    columns |= {"log_prob": log_probs, "reference": of_reference, "entropy": entropies}
    if recomputed:
        columns["old"] = (log_probs + rng.normal(scale=0.8, size=log_probs.shape)).astype(np.float32)
        counted = batch["loss_mask"]
        assert (columns["old"][counted] - batch["old_log_prob"][counted] > np.log(config.importance_cap)).any()
    rows = zip(*(value.ravel().tolist() for value in columns.values()), strict=True)
    expected = oracle.update(
        [dict(zip(columns, row, strict=True)) for row in rows], low=config.clip_low, high=config.clip_high,
        dual=config.clip_dual, cap=config.importance_cap, estimator=estimator,
    )  # fmt: skip
    assert min(expected["clip_high"], expected["clip_low"], expected["clip_dual"]) > 1
    assert all(0 < expected["control_tokens"]) and all(expected["control_tokens"] < expected["kl_tokens"])
    state = train_state(params, optax.sgd(0.0), digits.placement())
    got = learner.update(state, [batch], reference, [columns["old"]] if recomputed else None)[1]
    assert set(got) == set(expected) | {"grad_norm", "skipped"}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
