"""A tree as one segment, by hand. On random trees, cut and packed: test_packing.py."""

import numpy as np

from data_pipeline.prompts import Prompt
from data_pipeline.tree_segments import tree_segment

PROMPT = Prompt(
    "p", "s", "easy", "?", "1", (), np.arange(100, 104, dtype=np.int32), np.zeros((0, 1176), np.float32),
    np.zeros((0, 3), np.int32), np.array([[0, 1, 2, 3]] * 3), 7,
)  # fmt: skip


def test_what_is_shared_stands_there_once():
    responses = [np.array([1, 2, 3, 4]), np.array([1, 2, 5]), np.array([6])]
    extras = [{"x": np.arange(len(r), dtype=np.int32)} for r in responses]
    segment = tree_segment(PROMPT, responses, [-1, 0, -1], [0, 2, 0], extras)
    assert segment.token_ids.tolist() == [100, 101, 102, 103, 1, 2, 3, 4, 5, 6]
    assert segment.extras["back"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 3, 6]
    assert segment.extras["first_leaf"].tolist() == [0] * 4 + [0, 0, 0, 0, 1, 2]
    assert segment.extras["last_leaf"].tolist() == [2] * 4 + [1, 1, 0, 0, 1, 2]
    assert segment.positions[0].tolist() == [0, 1, 2, 3, 11, 12, 13, 14, 13, 11]
    assert segment.extras["x"].tolist() == [0] * 4 + [0, 1, 2, 3, 2, 0]
