"""Positions and windows equal transformers'; packing keeps its promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from data_pipeline.mrope import mrope_positions
from data_pipeline.packing import plan_rows
from data_pipeline.vision_layout import vision_layout

IMAGE = 99


class _Positions(torch.nn.Module):
    """Just enough of transformers' model to call its own position function."""

    config = Qwen2_5_VLConfig()
    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids


def random_prompt(rng):
    tokens, grids = rng.integers(0, 90, rng.integers(1, 6)).tolist(), []
    for _ in range(rng.integers(0, 4)):
        h, w = (2 * rng.integers(1, 13, 2)).tolist()
        grids.append((1, h, w))
        tokens += [IMAGE] * (h * w // 4) + rng.integers(0, 90, rng.integers(1, 5)).tolist()
    return np.array(tokens), np.array(grids, int).reshape(-1, 3)


def test_mrope_positions_equal_transformers():
    rng, theirs = np.random.default_rng(0), _Positions()
    for _ in range(200):
        tokens, grids = random_prompt(rng)
        kinds = torch.tensor((tokens == IMAGE).astype(int))[None]
        expected, delta = theirs.get_rope_index(
            torch.tensor(tokens)[None], kinds, image_grid_thw=torch.tensor(grids) if len(grids) else None
        )
        positions, offset = mrope_positions(tokens, grids, image_token_id=IMAGE)
        np.testing.assert_array_equal(positions, expected[:, 0])
        assert offset == int(delta[0])


def test_missing_image_tokens_are_an_error():
    with pytest.raises(ValueError, match="image of grid 1x4x4 needs 4 image tokens"):
        mrope_positions(np.array([1, IMAGE, IMAGE, 2]), np.array([[1, 4, 4]]), image_token_id=IMAGE)
    with pytest.raises(ValueError, match="image tokens without an image"):
        mrope_positions(np.array([1, IMAGE]), np.zeros((0, 3), int), image_token_id=IMAGE)


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
