"""The scheduler against a plain recursion, with a model whose cache is the token ids themselves.

The stand-in draws a token from a hash of what it finds in the row's pages, and of one of its weights. So a page that is
freed too early, copied wrongly or written to by two leaves changes tokens, and so does a weight of another version than the
token says; a whole tree of the engine must equal one computed without pages.
"""

import dataclasses
import functools
import itertools
import math
import zlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ares_jax.errors import UserError
from ares_jax.params import to_flat, with_params
from ares_jax.sampling import Engine, EngineOptions, RolloutRequest
from ares_jax.sampling.branching import BRANCH_AT, BRANCH_CHOICES, forks
from ares_jax.sampling.programs import DecodeOutput, PrefillChunk
from tests import digits

EOS, WINDOW, TAU, STEPS, PARTS = 0, 2, 0.5, 3, 3
PAGES, PAGE_SIZE, SLOTS, PROMPT, CONTEXT = 27, 4, 5, 8, 24
WEIGHT = "text.norm"  # which of them the stand-in looks at
# Tokens as text: none (EOS), halves of a character, single letters, and two together.
TABLE = [b"", b"\xc3", b"\xa9", *(bytes([97 + i % 4]) for i in range(9)), b"ab", b"cd", b"da", b"bb"]


def draw(context, key, place, version):
    """Returns a token below 16 and an entropy in quarters (so that means are exact) from all that may matter."""
    bits = zlib.crc32(np.array([*context, *key, place, version], np.int64).tobytes())
    return (bits & 15), np.float32((bits >> 4 & 3) / 4)


@functools.cache
def leaf_key(seed, index):
    return tuple(np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), index))).tolist())


def is_trigger(token):
    return token % 3 != 1


def weights(version):
    """Returns those with which the stand-in draws as it does at this version."""
    flat = to_flat(digits.model())
    return {**flat, WEIGHT: jnp.full_like(flat[WEIGHT], version)}


class TokenCache:
    """Stands in for `Programs`: a page holds token ids."""

    def __init__(self, references):
        self.references = references

    def parts(self, prompts):
        return [PrefillChunk(False, i, 1) for i in range(PARTS)]

    def prefill_part(self, params, cache, prompts, x, part):
        """Writes every third token."""
        part = part.first
        assert x == (part - 1 if part else None), "a part begins with what another gave than the one before"
        assert (prompts.pages == 0).all() or all(self.references(page) == 1 for page in prompts.pages[prompts.pages > 0])
        for row, segment, table in zip(prompts.tokens, prompts.segment_ids, prompts.pages, strict=True):
            for slot in np.flatnonzero(segment)[part::PARTS]:
                cache[table[slot // PAGE_SIZE], slot % PAGE_SIZE] = row[slot]
        return cache, part

    def copy_pages(self, cache, source, target):
        cache[target] = cache[source]
        return cache

    def read_pages(self, cache, pages):
        return cache[pages]

    def write_pages(self, cache, pages, content):
        assert all(self.references(page) == 1 for page in pages if page)
        cache[pages] = content
        return cache

    def decode(self, params, cache, tables, rows):
        shape, version = (STEPS, len(rows.token)), int(params[WEIGHT][0])
        out = DecodeOutput(*(np.zeros(shape, kind) for kind in (int, np.float32, np.float32, np.float32, bool, bool)))
        written = [p for r in np.flatnonzero(rows.alive) for p in self.written(tables[r], rows.length[r], rows, r)]
        assert len(set(written)) == len(written), "two rows write to one page"
        assert all(page > 0 and self.references(page) == 1 for page in written), "a shared page is written to"
        for r in np.flatnonzero(rows.alive):
            token, length, place = rows.token[r], rows.length[r], rows.response_index[r]
            ring, ring_tokens = list(rows.ring[r]), list(rows.ring_tokens[r])
            for k in range(STEPS):
                cache[tables[r][length // PAGE_SIZE], length % PAGE_SIZE] = token
                length += 1
                slots = np.arange(length)
                context = cache[tables[r][slots // PAGE_SIZE], slots % PAGE_SIZE]
                token, entropy = draw(context, rows.key[r], place, version)
                place += 1
                ring, ring_tokens = ring[1:] + [entropy], ring_tokens[1:] + [token]
                mean = np.float32(sum(ring) / WINDOW) if place >= WINDOW else np.float32(0)
                hit = place >= WINDOW and mean >= rows.tau_high[r] and is_trigger(ring_tokens[0])
                for column, value in zip(out, (token, -entropy, entropy, mean, hit, True), strict=True):
                    column[k, r] = value
                if token == EOS or place >= rows.end[r]:
                    break
        return cache, rows, out

    @staticmethod
    def written(table, length, rows, r):
        last = length + min(STEPS, rows.end[r] - rows.response_index[r]) - 1
        return [int(page) for page in table[length // PAGE_SIZE : last // PAGE_SIZE + 1]]


def new_engine(pages=PAGES, slots=SLOTS):
    options = EngineOptions(slots, PAGE_SIZE, pages, PROMPT, 4, CONTEXT, 2, STEPS, WINDOW)
    nothing = np.zeros(digits.VOCABULARY, bool)
    model = with_params(digits.model(), weights(0))
    engine = Engine(model, options, eos_token_ids=[EOS], banned=nothing, trigger_mask=nothing, token_bytes=TABLE)
    engine._programs = TokenCache(engine._pool.references)
    engine._kv_pages = np.zeros((pages, PAGE_SIZE), np.int64)
    return engine


def request(length=5, seed=0, group_size=4, root_leaves=2, max_new_tokens=12, tau_high=TAU, per_sequence=2, stop=(),
            rule=("window_end", "first")):  # fmt: skip
    tokens = (np.arange(length) * 7 + seed) % 12  # 12 and 13 are the image and video placeholders
    return RolloutRequest(
        f"{length}/{seed}", tokens.astype(np.int32), np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32),
        np.broadcast_to(np.arange(length), (3, length)), 0, seed, group_size, root_leaves, per_sequence, tau_high,
        *rule, 1.0, 1.0, 0, max_new_tokens, tuple(stop),
    )  # fmt: skip


def has_ended(tokens, r):
    text = b"".join(TABLE[token] for token in tokens)
    return EOS in tokens or any(stop.encode() in text for stop in r.stop)


def expected_tree(r, version_of=lambda leaf, place: 0):
    """Returns (tokens, window mask, parent, branch position) of every leaf, drawn with those versions of the weights."""
    leaves = []

    def grow(parent, start):
        tokens, entropies = ([], []) if parent < 0 else (list(leaves[parent][0][:start]), list(leaves[parent][4][:start]))
        while len(tokens) < r.max_new_tokens and not has_ended(tokens, r):
            version = version_of(len(leaves), len(tokens))
            token, entropy = draw([*r.token_ids, *tokens], leaf_key(r.seed, len(leaves)), len(tokens), version)
            tokens.append(token)
            entropies.append(entropy)
        means = np.array([sum(entropies[t : t + WINDOW]) / WINDOW for t in range(len(tokens))])
        means[len(tokens) - WINDOW + 1 :] = 0
        hits = (means >= r.tau_high) & [is_trigger(token) for token in tokens]
        hits[max(0, len(tokens) - WINDOW + 1) :] = False
        leaves.append((tokens, hits, parent, start, entropies, means))

    for _ in range(r.root_leaves):
        grow(-1, 0)
    spare = r.group_size - r.root_leaves
    points = taken(
        [leaf[5] for leaf in leaves], [leaf[1] for leaf in leaves], spare, r.max_branches_per_sequence, WINDOW,
        r.branch_at, r.branch_choice,
    )  # fmt: skip
    for point in [*points, *[(-1, 0)] * (spare - len(points))]:
        grow(*point)
    return leaves


def taken(means, masks, slots, per_root, window, at, choice):
    """Takes the best legal window again and again: the first at its fork, or the highest. Returns (root, position)."""
    later = 0 if at == "window_start" else max(1, window - 1)
    best: list[tuple[int, int]] = []
    while len(best) < slots:
        legal = [
            ((t + later, root) if choice == "first" else (-means[root][t], root, t), (root, t + later))
            for root in range(len(means))
            for t in range(len(means[root]))
            if masks[root][t]
            and 0 < t + later < len(means[root])
            and sum(other == root for other, _ in best) < per_root
            and not any(other == root and abs(t + later - p) < window for other, p in best)
        ]
        if not legal:
            break
        best.append(min(legal)[1])
    return best


def version_of(leaves):
    """Returns what says which version drew a token; -1 where there is none, so that a leaf that is too short differs."""
    columns = [leaf.policy_version.tolist() for leaf in leaves]
    return lambda leaf, place: columns[leaf][place] if place < len(columns[leaf]) else -1


def check_group(group, r):
    leaves = group.leaves
    expected = expected_tree(r, version_of(leaves))
    assert group.problem_id == r.problem_id and len(leaves) == r.group_size and group.first_roots == r.root_leaves
    later = 0 if r.branch_at == "window_start" else max(1, WINDOW - 1)
    for leaf, (tokens, hits, parent, start, _, means) in zip(leaves, expected, strict=True):
        assert leaf.token_ids.tolist() == tokens
        np.testing.assert_array_equal(leaf.window_mask, hits)
        np.testing.assert_array_equal(leaf.window_means, means)
        assert (leaf.parent, leaf.branch_position) == (parent, start)
        assert leaf.finish_reason == ("stop" if has_ended(tokens, r) else "length")
        assert (np.diff(leaf.policy_version[start:]) >= 0).all()
        if parent >= 0:
            assert expected[parent][1][start - later]
            np.testing.assert_array_equal(leaf.policy_version[:start], leaves[parent].policy_version[:start])


class Scheduler(RuleBasedStateMachine):
    """Requests come, are cancelled, meet new weights; pages are scarce enough for preemption."""

    def __init__(self):
        super().__init__()
        self.engine = new_engine()
        self.open, self.version = {}, 0
        self.last = {}  # of what was begun and finishes with its weights: their version

    @rule(
        length=st.integers(1, PROMPT), seed=st.integers(0, 4), roots=st.integers(1, 4), more=st.integers(0, 2),
        new=st.integers(1, CONTEXT - PROMPT), branching=st.booleans(), per_sequence=st.integers(0, 3),
        stop=st.lists(st.text("abcdé", min_size=1, max_size=3), max_size=2),
        rule=st.tuples(st.sampled_from(BRANCH_AT), st.sampled_from(BRANCH_CHOICES)),
    )  # fmt: skip
    def submit(self, length, seed, roots, more, new, branching, per_sequence, stop, rule):
        tau = TAU if branching else math.inf
        r = request(length, seed, roots + more, roots, new, tau, per_sequence, stop, rule)
        try:
            self.open[self.engine.submit(r)] = r
        except UserError as error:  # the largest trees need more pages than there are
            assert "cache pages" in str(error)

    @rule(times=st.integers(1, 3))
    def step(self, times):
        for _ in range(times):
            for number, group in self.engine.step():
                check_group(group, self.open.pop(number))
                last = self.last.pop(number, self.version)
                assert all((leaf.policy_version <= last).all() for leaf in group.leaves)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from(sorted(self.open)))
        self.engine.cancel(number)
        del self.open[number]

    @rule(finish=st.booleans())
    def reload(self, finish):
        self.version += 1
        self.last = {number: self.engine.policy_version for number in self.engine._begun} if finish else {}
        self.engine.load_weights(weights(self.version), self.version, finish=finish)

    @precondition(lambda self: self.engine._groups)
    @rule(data=st.data())
    def preempt(self, data):
        self.engine._preempt(self.engine._groups[data.draw(st.sampled_from(sorted(self.engine._groups)))])

    @invariant()
    def pages_are_counted(self):
        groups = self.engine._groups.values()
        held = [p for g in groups for pages in (g.prompt_pages, *(leaf.pages for leaf in g.leaves)) for p in pages]
        assert all(self.engine._pool.references(page) == held.count(page) for page in range(1, PAGES))
        assert self.engine._pool.free == PAGES - 1 - len(set(held))
        assert len(self.engine._live) <= SLOTS

    @invariant()
    def pages_are_shared(self):
        for group in self.engine._groups.values():
            prompt = len(group.request.token_ids)
            for page in group.prompt_pages[: (prompt - 1) // PAGE_SIZE]:
                # The prompt's own reference, and one of each leaf: all begin with it, branches too.
                assert self.engine._pool.references(page) == 1 + len(group.leaves)
            for leaf in group.leaves:
                source = group.prompt_pages if leaf.parent < 0 else group.leaves[leaf.parent].pages
                shared = (prompt + leaf.start - 1) // PAGE_SIZE  # full ones before the token that it feeds again
                assert leaf.pages[:shared] == source[:shared]
            held = {page for pages in group.page_lists() for page in pages}
            assert (
                len(held)
                == group.pages_held(PAGE_SIZE)
                <= self.engine.options.group_pages(prompt, group.request.group_size, group.request.max_new_tokens)
            )

    def teardown(self):
        for _ in range(400):
            self.step(1)
            self.pages_are_counted()
        assert self.engine.policy_version == self.version
        assert not self.open and not self.engine.busy  # all were served, each once (a second answer is a KeyError)
        assert self.engine._pool.free == PAGES - 1


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("pages", "slots"), [(400, 64), (400, 3), (30, 64), (30, 1)])
def test_trees_are_the_same_whatever_the_room(pages, slots):
    engine = new_engine(pages, slots)
    sizes = [1 + i % 5 for i in range(20)]
    requests = [request(1 + i % PROMPT, i, size, 1 + i % 3 % size) for i, size in enumerate(sizes)]
    for r, group in zip(requests, engine.generate(requests), strict=True):
        check_group(group, r)
    assert engine._pool.free == pages - 1


def test_a_crowded_engine_learns_how_much_to_admit():
    engine = new_engine(pages=80, slots=64)
    requests = [request(8, seed, 6, 3, max_new_tokens=16) for seed in range(40)]
    groups = engine.generate(requests)
    needed = sum(group.computed_tokens - group.prompt_tokens for group in groups)
    assert engine.stats()["preempted"] <= len(requests) // 2
    assert engine.stats()["decoded"] == needed  # nothing is drawn twice


def test_weights_that_come_while_a_prompt_is_prefilled_see_all_of_it():
    engine = new_engine(pages=400)
    engine.submit(request(seed=1, tau_high=math.inf))
    engine.step()
    number, seen = engine.submit(request(8, seed=2)), []
    fill = engine._programs.prefill_part
    engine._programs.prefill_part = lambda *rest: (seen.append((engine.policy_version, rest[-1].first)), fill(*rest))[1]
    engine.step()
    engine.load_weights(weights(5), 5)
    while number not in (finished := dict(engine.step())):
        pass
    assert seen == [(0, 0), *((5, part) for part in range(PARTS))]
    check_group(finished[number], request(8, seed=2))


def test_branching_costs_the_new_tokens_only():
    group = new_engine(pages=400).generate([request(seed=1, group_size=6, max_new_tokens=16)])[0]
    assert group.branches > 0
    delivered = sum(len(leaf.token_ids) for leaf in group.leaves)
    shared = sum(leaf.branch_position for leaf in group.leaves)
    assert group.computed_tokens == group.prompt_tokens + delivered - shared
    assert group.shared_tokens == (len(group.leaves) - 1) * group.prompt_tokens + shared


@given(
    st.integers(1, PROMPT), st.integers(0, 9), st.integers(1, 4), st.integers(0, 4), st.integers(1, CONTEXT - PROMPT),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_tree_that_fits_by_sharing_is_drawn_in_the_smallest_pool(length, seed, roots, more, new, branching):
    r = request(length, seed, roots + more, roots, new, TAU if branching else math.inf)
    # The prompt's pages, and every leaf's but those that the prompt fills before its last token.
    needed = -(-length // PAGE_SIZE) + r.group_size * (-(-(length + new) // PAGE_SIZE) - (length - 1) // PAGE_SIZE)
    engine = new_engine(pages=needed + 1)
    assert engine.room(length, r.group_size) >= new
    check_group(engine.generate([r])[0], r)
    assert engine._pool.free == needed and engine.stats()["preempted"] == 0
    too_small = new_engine(pages=needed)
    assert too_small.room(length, r.group_size) < new
    with pytest.raises(UserError, match=f"{needed} cache pages, the limit is {needed - 1}; raise sampler.pages"):
        too_small.submit(r)


def test_the_smallest_pool_is_used_up():
    whole = (request(7, seed, 3, 3, 9, math.inf) for seed in itertools.count())
    r = next(r for r in whole if all(len(leaf[0]) == r.max_new_tokens for leaf in expected_tree(r)))
    engine, free = new_engine(pages=2 + 3 * 3 + 1), []
    decode = engine._programs.decode
    engine._programs.decode = lambda *rest: (free.append(engine._pool.free), decode(*rest))[1]
    check_group(engine.generate([r])[0], r)
    assert min(free) == 0


def test_stop_strings_end_leaves_at_the_token_that_completes_them():
    plain = request(seed=3, group_size=6, root_leaves=6, max_new_tokens=16, tau_high=math.inf)
    engine = new_engine(pages=400)
    free, stopped = engine.generate([plain, dataclasses.replace(plain, stop=("é", "dd", "abc"))])
    texts, early = [b"".join(TABLE[token] for token in leaf.token_ids) for leaf in free.leaves], 0
    for text, leaf, whole in zip(texts, stopped.leaves, free.leaves, strict=True):
        assert leaf.token_ids.tolist() == whole.token_ids[: len(leaf.token_ids)].tolist()
        early += len(leaf.token_ids) < len(whole.token_ids)
        found = any(stop.encode() in text for stop in ("é", "dd", "abc"))
        assert found or len(leaf.token_ids) == len(whole.token_ids)
        assert leaf.finish_reason == ("stop" if found else whole.finish_reason)
    assert early > 2
    silent = Engine(
        digits.model(), engine.options, eos_token_ids=[EOS],
        banned=np.zeros(digits.VOCABULARY, bool), trigger_mask=np.zeros(digits.VOCABULARY, bool),
    )  # fmt: skip
    with pytest.raises(UserError, match="5/3: stop strings, but this engine was made without token_bytes"):
        silent.submit(dataclasses.replace(plain, stop=("a",)))


def test_cancelled_requests_leave_nothing_behind():
    engine = new_engine()
    numbers = [engine.submit(request(seed=seed)) for seed in range(4)]
    engine.step()
    for number in (numbers[0], numbers[3], 1000):
        engine.cancel(number)
    finished = []
    while engine.busy:
        finished += engine.step()
    assert sorted(number for number, _ in finished) == numbers[1:3]
    assert engine._pool.free == PAGES - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(length=0), "need a prompt"),
        (dict(root_leaves=5), "root_leaves=5"),
        (dict(root_leaves=0), "root_leaves=0"),
        (dict(length=9), "the limit is 8; raise sampler.max_prompt_tokens"),
        (dict(max_new_tokens=20), "the limit is 24; raise sampler.max_response_tokens"),
        (dict(group_size=6, max_new_tokens=16), "32 cache pages, the limit is 26; raise sampler.pages"),
    ],
)
def test_impossible_requests_are_refused_with_the_limit(changes, words):
    with pytest.raises(UserError, match=words):
        new_engine().submit(request(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *((dict(temperature=value), f"temperature={value:g}; take 0") for value in (1e-9, -1.0, math.inf, math.nan)),
        *((dict(top_p=value), f"top_p={value:g}") for value in (1.5, -0.1, math.nan)),
        (dict(top_k=-1), "top_k=-1"),
        (dict(tau_high=math.nan), "tau_high=nan"),
        *((dict(token_ids=np.array([1, value])), "the model has 0 to 447") for value in (-1, 448)),
    ],
)
def test_what_would_draw_nonsense_is_refused(changes, words):
    good = request(2)
    new_engine().submit(good)
    with pytest.raises(UserError, match=words):
        new_engine().submit(dataclasses.replace(good, **changes))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=8), min_size=1, max_size=3),
    st.integers(0, 5), st.integers(0, 3), st.integers(1, 4), st.sampled_from(BRANCH_AT), st.sampled_from(BRANCH_CHOICES),
)  # fmt: skip
def test_forks_are_what_taking_the_best_legal_window_again_and_again_gives(windows, slots, per_root, window, at, choice):
    """And those that are known while the roots are drawn are the first of them."""
    means = [np.array([mean for mean, _ in leaf], np.float32) for leaf in windows]
    masks = [np.array([mask for _, mask in leaf], bool) for leaf in windows]
    for mask in masks:
        mask[max(0, len(mask) - window + 1) :] = False  # windows that are not complete
    rule = {"slots": slots, "max_per_root": per_root, "window": window, "branch_at": at, "branch_choice": choice}
    chosen = forks(means, masks, known=math.inf, **rule)
    assert chosen == taken(means, masks, slots, per_root, window, at, choice)
    for known in range(9) if choice == "first" else ():
        so_far = [mask[: max(known, 0)].copy() for mask in masks]
        for mask in so_far:
            mask[max(0, known - window + 1) :] = False
        early = forks([m[:known] for m in means], so_far, known=known, **rule)
        assert early == chosen[: len(early)] and len(early) >= sum(p + window <= known for _, p in chosen)
