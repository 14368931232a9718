"""Attention windows hold the patches they should; packing keeps its promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import plan_rows
from data_pipeline.vision_layout import vision_layout


@pytest.mark.parametrize("rows, columns", [(2, 2), (8, 8), (10, 6), (12, 20), (18, 34)])
def test_windows_hold_the_patches_of_one_square(rows, columns):
    layout = vision_layout(np.array([[1, rows, columns], [1, 4, 4]]))
    first = layout.frame_ids == 1
    assert first.sum() == rows * columns and set(layout.frame_ids) == {1, 2}
    for window in set(layout.window_ids[first]):
        inside = layout.position_hw[layout.window_ids == window]
        assert len(set((inside[:, 0] // 8).tolist())) == len(set((inside[:, 1] // 8).tolist())) == 1
    squares = -(-rows // 8) * -(-columns // 8)
    assert len(set(layout.window_ids[first])) == squares
    assert sorted(map(tuple, layout.position_hw[first])) == [(r, c) for r in range(rows) for c in range(columns)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=60))
def test_packing_loses_nothing_and_overfills_nothing(sizes):
    tokens, patches = [t for t, _ in sizes], [p for _, p in sizes]
    plan = plan_rows(tokens, patches, row_tokens=40, row_patches=30)
    assert sorted(i for row in plan for i in row) == list(range(len(sizes)))
    for row in plan:
        assert sum(tokens[i] for i in row) <= 40 and sum(patches[i] for i in row) <= 30
    # First fit: no row could take the whole of a later one.
    for early, late in zip(plan, plan[1:], strict=False):
        assert sum(tokens[i] for i in early + late) > 40 or sum(patches[i] for i in early + late) > 30 or len(late) > 1


def test_a_segment_larger_than_a_row_is_named():
    with pytest.raises(ValueError, match="segment 1 has 50 tokens.*raise packing.row_tokens"):
        plan_rows([3, 50], [0, 0], row_tokens=40, row_patches=30)
