"""The engine against whole forward passes, and its promises about trees."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from ares_jax.aepo.windows import validated
from ares_jax.cold_start import sft
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.params import to_flat
from ares_jax.sampling.requests import rollout_request
from ares_jax.training.log_probs import token_statistics
from data_pipeline.packing import pack
from kernels import window_means
from tests import digits

TAU = 5.4  # a random model's token entropies lie around log(400) = 6


def request(prompt, seed=0, **changes):
    plain = dict(group_size=6, root_leaves=3, max_branches_per_sequence=2, tau_high=TAU, max_new_tokens=20)
    return rollout_request(prompt, seed=seed, **{**plain, **changes})


def statistics_of(prompt, token_ids, temperature):
    """Log-probs and entropies of a response by one whole forward pass."""
    segment = sft.example(prompt, token_ids)
    (batch,) = pack([segment], row_tokens=len(segment.token_ids), row_patches=48, rows=1)
    banned = jnp.array(digits.banned())
    statistics = token_statistics(digits.model(), banned, temperature=temperature)
    log_probs, entropies = statistics(to_flat(digits.model()), batch)
    return np.asarray(log_probs[0, -len(token_ids) :]), np.asarray(entropies[0, -len(token_ids) :])


@pytest.fixture(scope="module")
def groups():
    prompts = digits.prompts(5)
    return prompts, digits.engine().generate([request(p, seed=i, temperature=1.1) for i, p in enumerate(prompts)])


def test_log_probs_and_entropies_are_the_learners(groups):
    for prompt, group in zip(groups[0][:2], groups[1][:2], strict=True):
        for leaf in group.leaves:
            log_probs, entropies = statistics_of(prompt, leaf.token_ids, 1.1)
            np.testing.assert_allclose(leaf.log_probs, log_probs, atol=1e-4)
            np.testing.assert_allclose(leaf.entropies, entropies, atol=1e-4)


def test_groups_are_complete_trees_that_branch_at_validated_windows_only(groups):
    trigger = np.random.default_rng(0).random(digits.VOCABULARY) < 0.3
    branches = 0
    for prompt, group in zip(*groups, strict=True):
        assert len(group.leaves) == 6 and [leaf.parent for leaf in group.leaves[:3]] == [-1] * 3
        for leaf in group.leaves:
            h = leaf.entropies
            means, complete = (np.asarray(x)[0] for x in window_means(jnp.array(h)[None], jnp.ones((1, len(h)), bool), 3))
            np.testing.assert_array_equal(leaf.window_means, means)
            expected = validated(means, complete, trigger[leaf.token_ids], np.float32(TAU))
            np.testing.assert_array_equal(leaf.window_mask, expected)
            if leaf.parent >= 0:
                branches += 1
                parent = group.leaves[leaf.parent]
                assert parent.window_mask[leaf.branch_position - 2]  # the window of 3 is complete where it forks
                shared = slice(0, leaf.branch_position)
                np.testing.assert_array_equal(leaf.token_ids[shared], parent.token_ids[shared])
        own = sum(len(leaf.token_ids) - leaf.branch_position for leaf in group.leaves)
        assert group.computed_tokens == len(prompt.token_ids) + own
    assert branches > 5


def test_a_tree_does_not_depend_on_its_company(groups):
    prompts, together = groups
    alone = digits.engine(slots=4).generate([request(prompts[3], seed=3, temperature=1.1)])[0]
    for a, b in zip(alone.leaves, together[3].leaves, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert (a.parent, a.branch_position) == (b.parent, b.branch_position)


def test_in_one_shape_the_bits_do_not_depend_on_the_company():
    requests = [request(p, seed=i, temperature=1.1, top_p=0.9) for i, p in enumerate(digits.prompts(8))]
    requests.append(request(digits.prompts(8)[5], seed=9, temperature=5.0, top_k=3))  # it often draws again
    # 64 rows, or 48 leaves: there XLA's products round otherwise than those of 16.
    roomy, tight = (digits.engine(slots=64, one_shape=True, pages=pages) for pages in (400, 70))
    together = roomy.generate(requests)
    backwards = tight.generate(requests[::-1])[::-1]
    assert tight.stats()["preempted"] > 0
    for index in (2, 5, 8):
        for other in (roomy.generate([requests[index]])[0], backwards[index]):
            for a, b in zip(together[index].leaves, other.leaves, strict=True):
                for name, value in vars(a).items():
                    np.testing.assert_array_equal(value, getattr(b, name))


ENGINES = {  # by slots, pages and whether all has one shape
    case: functools.cache(functools.partial(digits.engine, slots=case[0], pages=case[1], one_shape=case[2]))
    for case in ((64, 400, True), (64, 70, True), (32, 400, False), (32, 64, False), (4, 400, False))
}


@functools.cache
def several():
    """Requests of several lengths and settings, and the tree of each one drawn alone, without and with `one_shape`."""
    kinds = (dict(temperature=1.1), dict(top_p=0.9), dict(temperature=0.0), dict(temperature=2.0, top_k=3), {}, {})
    asked = [
        request(p, seed=i, group_size=4, root_leaves=2, max_new_tokens=12, **s)
        for i, (p, s) in enumerate(zip(digits.prompts(6), kinds, strict=True))
    ]
    engines = {True: ENGINES[64, 400, True](), False: ENGINES[32, 400, False]()}
    return asked, {one_shape: [engine.generate([r])[0] for r in asked] for one_shape, engine in engines.items()}


@given(
    case=st.sampled_from(sorted(ENGINES)), order=st.permutations(range(6)), together=st.integers(1, 6),
    steps=st.lists(st.integers(0, 2), min_size=6, max_size=6), cancelled=st.integers(0, 12),
)  # fmt: skip
@example(case=(64, 70, True), order=range(6), together=6, steps=[0] * 6, cancelled=12)
@example(case=(32, 64, False), order=range(6), together=6, steps=[0] * 6, cancelled=12)
@settings(max_examples=8, deadline=None)
def test_a_tree_is_the_same_under_any_schedule(case, order, together, steps, cancelled):
    """Whatever comes before, beside and after it, in whichever order, with few slots or pages."""
    asked, alone = several()
    engine, numbers, finished = ENGINES[case](), {}, {}
    for index, pause in zip(order[:together], steps, strict=False):
        numbers[engine.submit(asked[index])] = index
        for _ in range(pause):
            finished.update(engine.step())
        if cancelled == index:
            engine.cancel(next(number for number, other in numbers.items() if other == index))
    while engine.busy:
        finished.update(engine.step())
    assert {numbers[number] for number in finished} | {cancelled} >= set(order[:together])
    for number, group in finished.items():
        for a, b in zip(group.leaves, alone[case[2]][numbers[number]].leaves, strict=True):
            if case[2]:  # to the bit
                for name, value in vars(a).items():
                    np.testing.assert_array_equal(value, getattr(b, name))
            else:
                np.testing.assert_array_equal(a.token_ids, b.token_ids)
                np.testing.assert_array_equal(a.window_mask, b.window_mask)
                assert (a.parent, a.branch_position, a.finish_reason) == (b.parent, b.branch_position, b.finish_reason)
                np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_preempted_groups_come_out_the_same(groups):
    prompts, together = groups
    tight = digits.engine(pages=64)
    result = tight.generate([request(p, seed=i, temperature=1.1) for i, p in enumerate(prompts)])
    assert tight.stats()["preempted"] > 0
    own = sum(len(leaf.token_ids) - leaf.branch_position for group in result for leaf in group.leaves)
    assert tight.stats()["decoded"] == own  # nothing is drawn twice
    for group, other in zip(result, together, strict=True):
        for a, b in zip(group.leaves, other.leaves, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
    assert tight.stats()["free_pages"] == 63  # nothing leaked


def test_prompts_are_padded_to_the_smallest_shape_and_their_trees_stay_the_same():
    prompts = digits.prompts(6)
    (long,) = (i for i, p in enumerate(prompts) if len(p.token_ids) == 48)
    plain = dict(temperature=0.0, group_size=2, root_leaves=1, max_new_tokens=10)
    asked = [request(p, **plain) for p in (prompts[0], prompts[long])]
    nothing = dict(patches=np.zeros((0, 1176), np.float32), grid_thw=np.zeros((0, 3), np.int32))
    places = np.broadcast_to(np.arange(13), (3, 13))
    asked.append(dataclasses.replace(asked[0], token_ids=np.arange(20, 33), positions=places, rope_delta=0, **nothing))

    def drawn(engine, *batches):
        fill, shapes = engine._programs.prefill_part, []

        def spied(params, cache, prompts, x, part):
            if x is None:
                shapes.append((*prompts.tokens.shape, prompts.vision and prompts.vision.patches.shape[1]))
            return fill(params, cache, prompts, x, part)

        engine._programs.prefill_part = spied
        trees = [tree for batch in batches for tree in engine.generate(batch)]
        return trees, shapes

    engine = digits.engine()
    trees, shapes = drawn(engine, asked[:1], asked[1:2], asked[2:], asked)
    assert shapes == 2 * [(1, 32, 8), (1, 48, 36), (1, 16, None)]  # together as alone
    widest = digits.engine()
    widest._shapes._tokens, widest._shapes._patches = (64,), (48,)
    expected, shapes = drawn(widest, asked)
    assert shapes == [(4, 64, 48)]
    for alone, together in zip(trees[:3], trees[3:], strict=True):
        for a, b in zip(alone.leaves, together.leaves, strict=True):
            np.testing.assert_array_equal(a.log_probs, b.log_probs)
    for tree, other in zip(trees, expected * 2, strict=True):
        for a, b in zip(tree.leaves, other.leaves, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_a_prompt_prefilled_layer_by_layer_while_others_decode_gives_the_same_bits():
    first, second = (request(p, seed=i) for i, p in enumerate(digits.prompts(2)))
    alone = digits.engine(prefill_layers=1).generate([second])[0]
    engine, order = digits.engine(prefill_layers=1), []

    def spied(name, program, *arguments):
        order.append(name)
        return program(*arguments)

    for name in ("prefill_part", "decode"):
        setattr(engine._programs, name, functools.partial(spied, name, getattr(engine._programs, name)))
    engine.submit(first)
    engine.step()
    assert order == ["prefill_part"] * 4 + ["decode"]  # nobody waits: two layers of the vision tower, two of the decoder
    number = engine.submit(second)
    finished = {}
    while engine.busy:
        finished.update(engine.step())
    assert order[5:12] == ["prefill_part", "decode"] * 3 + ["prefill_part"]
    whole = digits.engine().generate([second])[0]
    for a, b, c in zip(finished[number].leaves, alone.leaves, whole.leaves, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
        np.testing.assert_array_equal(a.token_ids, c.token_ids)
        np.testing.assert_allclose(a.log_probs, c.log_probs, atol=1e-5)


@pytest.mark.parametrize("one_shape, blocks", [(False, True), (True, False)])
def test_prompts_prefilled_some_tokens_at_a_time_give_the_same_trees(groups, one_shape, blocks, monkeypatch):
    """mRoPE positions and image features go on where the chunk before ended; pages are shared, forked, preempted."""
    shapes = digits.attend_in_blocks(monkeypatch, block=16) if blocks else set()
    prompts, whole = groups
    asked = [request(p, seed=i, temperature=1.1) for i, p in enumerate(prompts)]
    engine = digits.engine(prefill_chunk=8, pages=64, one_shape=one_shape)
    engine._kv_pages = jnp.full_like(engine._kv_pages, jnp.nan)  # what lies there before means nothing
    trees = engine.generate(asked)
    assert engine.stats()["preempted"] > 0 and engine.stats()["free_pages"] == 63
    assert {(8, 32), (8, 48)} <= shapes if blocks else not shapes
    for tree, other in zip(trees, whole, strict=True):
        for a, b in zip(tree.leaves, other.leaves, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            assert (a.parent, a.branch_position) == (b.parent, b.branch_position)
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
            np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-5)
    if one_shape:  # the same bits whatever else is drawn
        for a, b in zip(engine.generate(asked[3:4])[0].leaves, trees[3].leaves, strict=True):
            for name, value in vars(a).items():
                np.testing.assert_array_equal(value, getattr(b, name))


def test_others_decode_between_the_chunks_of_a_prompt_which_may_be_cancelled_there():
    long = sorted(digits.prompts(40), key=lambda p: -len(p.patches))[:2]
    for prompt in long:
        first, *_, last = np.flatnonzero(prompt.token_ids == digits.model().config.image_token_id) // 8
        assert first < last and len(prompt.token_ids) > 24  # the image lies in two chunks
    short = min(digits.prompts(6), key=lambda p: len(p.token_ids))
    asked = [request(p, seed=i, max_new_tokens=40, tau_high=math.inf) for i, p in enumerate([short, *long])]
    expected = digits.engine().generate([asked[2]])[0]
    engine, order = digits.engine(prefill_chunk=8), []
    fill, decode = engine._programs.prefill_part, engine._programs.decode
    engine._programs.prefill_part = lambda *a: (order.append("tower" if a[-1].tower else a[-1].start), fill(*a))[1]
    engine._programs.decode = lambda *a: (order.append("decode"), decode(*a))[1]
    engine.submit(asked[0])
    engine.step()
    order.clear()
    cancelled = engine.submit(asked[1])
    for _ in range(2):
        engine.step()
    engine.cancel(cancelled)
    number, finished = engine.submit(asked[2]), {}
    while engine.busy:
        finished.update(engine.step())
    assert order[:14:2] == ["tower", 0, "tower", 0, 8, 16, 24] and set(order[1:14:2]) == {"decode"}
    assert [o for o in order if isinstance(o, int)] == [0, *range(0, len(long[1].token_ids), 8)]  # none of padding alone
    assert engine.stats()["free_pages"] == 399 and cancelled not in finished
    for a, b in zip(finished[number].leaves, expected.leaves, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_greedy_is_the_argmax_of_the_whole_forward():
    prompt = digits.prompts(2)[1]
    plain = request(prompt, temperature=0.0, group_size=1, root_leaves=1, tau_high=math.inf, max_new_tokens=8)
    leaf = digits.engine().generate([plain])[0].leaves[0]
    banned = digits.banned()
    for n in range(len(leaf.token_ids)):
        segment = sft.example(prompt, leaf.token_ids[: n + 1])
        (batch,) = pack([segment], row_tokens=len(segment.token_ids), row_patches=48, rows=1)
        vision = VisionInputs(*(batch[f"patch{name}"] for name in ("es", "_positions", "_window_ids", "_frame_ids")))
        hidden = digits.model()(batch["tokens"], batch["positions"], batch["segment_ids"], vision)[0, -2]
        assert int(jnp.argmax(jnp.where(banned, -jnp.inf, hidden @ digits.model().head.T))) == leaf.token_ids[n]


def test_new_weights_are_marked_on_the_tokens_they_drew():
    engine = digits.engine()
    engine.submit(request(digits.prompts(1)[0], group_size=1, root_leaves=1, max_new_tokens=15))
    engine.step()
    engine.load_weights(jax.tree.map(lambda x: x * 1.01, to_flat(digits.model())), 7)
    finished = []
    while not finished:
        finished = engine.step()
    versions = finished[0][1].leaves[0].policy_version
    assert versions[0] == 0 and versions[-1] == 7 and (np.diff(versions) >= 0).all()


def test_what_can_never_fit_is_refused():
    engine = digits.engine()
    with pytest.raises(UserError, match="raise sampler.max_response_tokens"):
        engine.submit(request(digits.prompts(1)[0], max_new_tokens=1000))
    with pytest.raises(UserError, match="parameter .* is missing"):
        engine.load_weights({}, 1)
