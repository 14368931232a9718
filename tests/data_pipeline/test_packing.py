"""Packing on random segments and trees: every leaf is found again, whole and once, and no row holds more than it may."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.models.qwen2_5_vl.attention import causal_mask
from data_pipeline.errors import DataError
from data_pipeline.packing import Segment, leaf_runs, pack, response_segment, shapes
from data_pipeline.tree_layout import tree_layout
from data_pipeline.tree_segments import tree_segment

PAD = 50  # an image token


def image_prompt(tokens, images=0):
    """Returns a prompt of so many tokens with images of 2 x 2 patches."""
    return SimpleNamespace(
        token_ids=np.arange(100, 100 + tokens), patches=np.ones((4 * images, 1176), np.float32),
        grid_thw=np.array([[1, 2, 2]] * images, np.int32).reshape(-1, 3), positions=np.array([np.arange(tokens)] * 3),
        rope_delta=7, problem_id="p",
    )  # fmt: skip


def tree_of(prompt, lengths, parents, starts, names):
    """Returns a tree whose every distinct response token has a name of its own, and its leaves."""
    responses: list[np.ndarray] = []
    for length, parent, start in zip(lengths, parents, starts, strict=True):
        shared = responses[parent][:start] if parent >= 0 else np.zeros(0, int)
        responses.append(np.concatenate([shared, [next(names) for _ in range(length - start)]]).astype(int))
    layout = tree_layout(parents, starts, lengths)
    tokens = np.concatenate([responses[leaf][starts[leaf] :] for leaf in layout.leaves])
    fields = {"loss_mask": np.ones(len(tokens), bool), "token": tokens}
    return tree_segment(prompt, tokens, layout.first_leaf, layout.last_leaf, layout.predictor, fields), responses


@st.composite
def trees(draw):
    """Leaves that branch off each other, at any depth: (own tokens, parent, branch position)."""
    lengths, parents, starts = [], [], []
    for leaf in range(draw(st.integers(1, 7))):
        parent = draw(st.integers(-1, leaf - 1))
        start = draw(st.integers(0, lengths[parent])) if parent >= 0 else 0
        lengths.append(start + draw(st.integers(1, 6)))
        parents.append(parent)
        starts.append(start)
    return lengths, parents, starts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(trees(), st.integers(0, 2)), min_size=1, max_size=5), st.integers(0, 1), st.integers(0, 3))
def test_every_leaf_is_there_once(drawn, longer, halvings):
    names = iter(range(1000, 10_000))
    made = [tree_of(image_prompt(4, images), *tree, names) for tree, images in drawn]
    longest = 4 + max(max(lengths) for (lengths, _, _), _ in drawn)
    row_tokens = [n for n in (16, 32, 64, 128) if n >= longest][longer]  # few shapes: each is compiled for the mask
    size = {"rows": 4, "row_tokens": row_tokens, "row_patches": 8}
    batches = pack([segment for segment, _ in made], **size, halvings=halvings, parts=2)
    choices = [(s.rows, s.row_tokens, s.row_patches) for s in shapes(**size, halvings=halvings, parts=2)]
    given = [(*b["tokens"].shape, b["patches"].shape[1]) for b in batches]
    smaller = given[given.count(choices[0]) :]
    assert given[: len(given) - len(smaller)] == [choices[0]] * given.count(choices[0])
    assert smaller == [shape for shape in choices[1:] if shape in smaller]  # each once at most, the largest first
    found, counted = [], []
    for batch in batches:
        for r in range(len(batch["tokens"])):
            row = {name: value[r] for name, value in batch.items()}
            places = np.flatnonzero(row["segment_ids"])
            spans = np.stack([row["first_leaf"], row["last_leaf"]])
            mask = np.asarray(causal_mask(row["segment_ids"][None], spans[None]))[0]
            for number in range(1, row["segment_ids"].max() + 1):
                inside = np.flatnonzero(row["segment_ids"] == number)
                assert (np.diff(inside) == 1).all()
                for leaf in range(spans[1, inside].max() + 1):
                    path = [int(inside[(spans[0, inside] <= leaf) & (spans[1, inside] >= leaf)][-1])]
                    while path[0] > inside[0]:
                        path.insert(0, path[0] - int(row["predictor_offset"][path[0]]))
                    for i, place in enumerate(path):
                        assert np.flatnonzero(mask[place]).tolist() == path[: i + 1]
                    assert row["tokens"][path][:4].tolist() == [100, 101, 102, 103]
                    found.append(row["tokens"][path][4:].tolist())
                    assert (row["positions"][:, path] == [0, 1, 2, 3, *range(11, 7 + len(path))]).all()
            own = row["loss_mask"]
            assert (row["token"][own] == row["tokens"][own]).all() and set(np.flatnonzero(own)) <= set(places)
            counted += row["tokens"][own].tolist()
            images = sum(4 for _ in np.unique(row["patch_frame_ids"][row["patch_frame_ids"] > 0]))
            assert images == (row["patches"][:, 0] > 0).sum()
    assert sorted(found) == sorted(r.tolist() for _, responses in made for r in responses)
    assert sorted(counted) == sorted(set(np.concatenate([r for _, responses in made for r in responses]).tolist()))


@settings(max_examples=50, deadline=None)
@given(trees())
def test_the_size_of_a_run_of_leaves_is_what_its_tokens_say(tree):
    segment, _ = tree_of(image_prompt(3), *tree, iter(range(1000)))
    first, last = segment.token_fields["first_leaf"], segment.token_fields["last_leaf"]
    runs = leaf_runs(segment)
    for a in range(len(runs) - 1):
        for b in range(a + 1, len(runs)):
            assert runs[a, b] == ((first < b) & (last >= a)).sum()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 7)), min_size=1, max_size=60), st.integers(0, 2))
def test_sequences_are_never_cut(sizes, halvings):
    segments = []
    for i, (tokens, images) in enumerate(sizes):
        p = image_prompt(tokens, images)
        segments.append(Segment(np.full(tokens, i), p.positions, p.patches, p.grid_thw, {"x": np.arange(tokens)}))
    batches = pack(segments, rows=2, row_tokens=40, row_patches=28, halvings=halvings)
    found = []
    for b in batches:
        for row, ids, x in zip(b["tokens"], b["segment_ids"], b["x"], strict=True):
            for number in range(1, ids.max() + 1):
                inside = row[ids == number]
                assert (inside == inside[0]).all() and x[ids == number].tolist() == list(range(len(inside)))
                found.append(int(inside[0]))
                assert len(inside) == sizes[inside[0]][0]
    assert sorted(found) == list(range(len(sizes)))


def test_trees_are_cut_where_that_fills_rows():
    """Trees of 63 tokens, rows of 100: a half of every third fills what the other two leave. Whole, each takes a row."""
    tree = tree_of(image_prompt(3), [10] * 6, [-1] * 6, [0] * 6, iter(range(60)))[0]
    batches = pack([tree] * 24, rows=1, row_tokens=100, row_patches=1)
    assert len(batches) == 16


def demo_like(rng):
    """Returns trees as the digits task draws them: 32 prompts, 8 leaves, some of them branches."""
    found = []
    for _ in range(32):
        lengths, parents, starts = [], [], []
        for leaf in range(8):
            parent = int(rng.integers(4)) if leaf >= 4 and rng.random() < 0.5 else -1
            start = int(rng.integers(1, lengths[parent])) if parent >= 0 else 0
            lengths.append(start + int(rng.integers(8, 40)))
            parents.append(parent)
            starts.append(start)
        prompt = image_prompt(int(rng.integers(20, 40)))
        found.append(tree_of(prompt, lengths, parents, starts, iter(range(4000)))[0])
    return found


def test_little_is_padding():
    drawn = [demo_like(np.random.default_rng(seed)) for seed in range(4)]
    share = [pack(trees, rows=4, row_tokens=384, row_patches=1, halvings=2).padding for trees in drawn]
    assert np.mean(share) < 0.045


def test_processes_get_the_same_shapes_and_each_its_own():
    """As two processes do it that can only `gather`; one has few trees, the other many."""
    trees = demo_like(np.random.default_rng(0))
    barrier, given, results = threading.Barrier(2), [None, None], {}

    def process(index, segments):
        def gather(value):
            given[index] = value
            barrier.wait(timeout=20)
            both = list(given)
            barrier.wait(timeout=20)
            return both

        results[index] = pack(segments, rows=4, row_tokens=256, row_patches=1, halvings=2, gather=gather)

    threads = [threading.Thread(target=process, args=(i, part)) for i, part in enumerate((trees[:1], trees[1:12]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    few, many = ([b["tokens"].shape for b in results[i]] for i in range(2))
    assert few == many and results[0].padding > results[1].padding


def test_halves_have_fewer_rows_as_long_as_those_can_be_split():
    assert [s[:2] for s in shapes(8, 4096, 64, halvings=2, parts=1)] == [(8, 4096), (4, 4096), (2, 4096)]
    assert [s for s in shapes(8, 4096, 64, halvings=2, parts=4)] == [(8, 4096, 64), (4, 4096, 64), (4, 2048, 32)]
    assert [s for s in shapes(8, 4096, 64, halvings=1, parts=8)] == [(8, 4096, 64), (8, 2048, 32)]


def test_an_image_token_that_a_leaf_drew_is_named_before_anything_is_packed():
    def with_image(name, *leaves):
        prompt = image_prompt(4, 1)
        prompt.token_ids, prompt.problem_id = np.array([1, PAD, 2, 3]), name
        responses = [np.array(leaf) for leaf in leaves]
        branches = [0] + [2] * (len(leaves) - 1)
        layout = tree_layout([-1] + [0] * (len(leaves) - 1), branches, list(map(len, responses)))
        tokens = np.concatenate([responses[leaf][branches[leaf] :] for leaf in layout.leaves])
        return tree_segment(prompt, tokens, layout.first_leaf, layout.last_leaf, layout.predictor, {})

    size = {"rows": 1, "row_tokens": 16, "row_patches": 8, "placeholder_ids": {PAD, PAD + 1}}
    good, bad = with_image("good", [4, 5, 6], [4, 5, 7]), with_image("bad", [4, 5, 6], [4, 5, PAD + 1], [4, 5, 8])
    (batch,) = pack([good], **size)
    assert (batch["tokens"] == PAD).sum() == 1 and good.problem_id == "good"
    with pytest.raises(DataError, match="problem bad: 2 image tokens for 1 image features of 1 images of sizes 28x28"):
        pack([good, bad], **size)
    line = response_segment(image_prompt(4, 1), np.array([1, 2]), {})
    with pytest.raises(DataError, match="problem p: 0 image tokens for 1 image features of 1 images of sizes 28x28"):
        pack([line], **size)
    with pytest.raises(DataError, match="problem good: 8 image patches for 1 images of sizes 28x28 .*, which have 4"):
        pack([replace(good, patches=np.ones((8, 1176), np.float32))], **size)


@pytest.mark.parametrize("tokens, images, size", [(50, 0, "50 tokens"), (4, 9, "36 patches")])
def test_what_is_larger_than_a_row_is_named(tokens, images, size):
    small, large = (
        tree_of(image_prompt(n, i), [3], [-1], [0], iter(range(9)))[0] for n, i in ((2, 0), (tokens - 3, images))
    )
    with pytest.raises(ValueError, match=f"segment 1 has .*{size}.*raise packing.row_tokens"):
        pack([small, large], rows=2, row_tokens=40, row_patches=30)


def test_halves_of_rows_have_patches_for_whole_tokens():
    """Four devices with a row each: 136 patches, 68, and not 34, of which the vision tower would make 8.5 tokens."""
    found = shapes(4, 352, 136, halvings=6, parts=4)
    assert found == [(4, 352 >> n, patches) for n, patches in enumerate((136, 68, 32, 16, 8, 4, 4))]
    assert shapes(4, 352, 136, halvings=2, parts=1) == [(4, 352, 136), (2, 352, 136), (1, 352, 136)]
