"""A tree as one segment, by hand. On random trees, cut and packed: test_packing.py."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.prompts import Prompt
from data_pipeline.tree_layout import path, tree_layout
from data_pipeline.tree_segments import tree_segment

PROMPT = Prompt(
    "p", "s", "easy", "?", "1", np.arange(100, 104, dtype=np.int32), np.zeros((0, 1176), np.float32),
    np.zeros((0, 3), np.int32), np.array([[0, 1, 2, 3]] * 3), 7,
)  # fmt: skip


def test_what_is_shared_stands_there_once():
    responses = [np.array([1, 2, 3, 4]), np.array([1, 2, 5]), np.array([6])]
    layout = tree_layout([-1, 0, -1], [0, 2, 0], list(map(len, responses)))
    assert layout.leaves.tolist() == [0, 1, 2] and layout.parents.tolist() == [-1, 0, -1]
    assert layout.predictor.tolist() == [-1, 0, 1, 2, 1, -1]
    places = np.array([0, 1, 2, 3, 2, 0], np.int32)
    tokens = np.array([1, 2, 3, 4, 5, 6])
    segment = tree_segment(PROMPT, tokens, layout.first_leaf, layout.last_leaf, layout.predictor, {"x": places})
    assert segment.token_ids.tolist() == [100, 101, 102, 103, 1, 2, 3, 4, 5, 6]
    assert segment.token_fields["predictor_offset"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 3, 6]
    assert segment.token_fields["first_leaf"].tolist() == [0] * 4 + [0, 0, 0, 0, 1, 2]
    assert segment.token_fields["last_leaf"].tolist() == [2] * 4 + [1, 1, 0, 0, 1, 2]
    assert segment.positions[0].tolist() == [0, 1, 2, 3, 11, 12, 13, 14, 13, 11]
    assert segment.token_fields["x"].tolist() == [0] * 4 + [0, 1, 2, 3, 2, 0]


@st.composite
def trees(draw):
    """Leaves in any order in which parents come first: branches of branches, at the place of their parent, of nothing."""
    parents, starts, lengths = [], [], []
    for leaf in range(draw(st.integers(1, 9))):
        parents.append(draw(st.integers(-1, leaf - 1)))
        starts.append(draw(st.integers(0, lengths[parents[-1]])) if parents[-1] >= 0 else 0)
        lengths.append(starts[-1] + draw(st.integers(1, 6)))
    return parents, starts, lengths


@settings(max_examples=300, deadline=None)
@given(trees())
def test_the_layout_has_every_token_once_and_its_leaves_as_neighbours(tree):
    """Against names: a token is the leaf that drew it and its place there."""
    parents, starts, lengths = tree
    names: list[list[tuple[int, int]]] = []
    for leaf, (parent, start, length) in enumerate(zip(*tree, strict=True)):
        names.append((names[parent][:start] if parent >= 0 else []) + [(leaf, n) for n in range(start, length)])
    layout = tree_layout(*tree)
    assert sorted(layout.leaves.tolist()) == list(range(len(parents)))
    found = [name for leaf in layout.leaves.tolist() for name in names[leaf][starts[leaf] :]]
    assert len(set(found)) == len(found) == len(layout.first_leaf)
    for new, leaf in enumerate(layout.leaves.tolist()):
        own = path(layout.first_leaf, layout.last_leaf, new)
        assert [found[i] for i in own] == names[leaf]
        assert layout.predictor[own].tolist() == [-1, *own[:-1].tolist()]
        owner = layout.parents[new]
        before = names[leaf][starts[leaf] - 1][0] if starts[leaf] else None
        assert owner == (-1 if before is None else layout.leaves.tolist().index(before)) and owner < new
