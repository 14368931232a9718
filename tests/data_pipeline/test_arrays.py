"""Attention windows hold the patches they should."""

import numpy as np
import pytest

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
