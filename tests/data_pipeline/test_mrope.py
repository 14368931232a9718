"""mRoPE positions are integer-equal to transformers'; placeholders that do not match are named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from data_pipeline.errors import DataError
from data_pipeline.mrope import mrope_positions
from data_pipeline.placeholders import vision_spans

IMAGE, VIDEO = 98, 99


class _Positions(torch.nn.Module):
    """Just enough of transformers' model to call its own position function."""

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self, tokens_per_second: int):
        super().__init__()
        self.config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second})


def random_prompt(rng):
    """Returns tokens, grids and seconds per grid (0: an image) of text with up to three images and videos.

    Text may be missing at either end and between an image and a video; two of a kind have a token between them, as
    transformers takes what stands together for one.
    """
    tokens, grids, seconds = rng.integers(0, 90, rng.integers(0, 6)).tolist(), [], []
    for _ in range(rng.integers(0, 4)):
        h, w = (2 * rng.integers(1, 9, 2)).tolist()
        is_video = rng.random() < 0.5
        t = int(rng.integers(1, 7)) if is_video else 1
        grids.append((t, h, w))
        seconds.append(2 / rng.choice([0.5, 1, 2, 3, 12, 23.976, 24, 30, rng.uniform(0.1, 60)]) if is_video else 0)
        kind = VIDEO if is_video else IMAGE
        tokens += [7] * (tokens[-1:] == [kind]) + [kind] * (t * h * w // 4)
        tokens += rng.integers(0, 90, rng.integers(0, 4)).tolist()
    return np.array(tokens or [7]), np.array(grids, int).reshape(-1, 3), np.array(seconds, np.float32)


def their_positions(prompts, side, tokens_per_second):
    """transformers' answer for one padded batch."""
    length = max(len(tokens) for tokens, _, _ in prompts) + 3
    ids, mask = np.zeros((2, len(prompts), length), np.int64)
    for row, (tokens, _, _) in enumerate(prompts):
        here = slice(length - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, here], mask[row, here] = tokens, 1
    grids, seconds = (np.concatenate([prompt[i] for prompt in prompts]) for i in (1, 2))
    images, videos = grids[seconds == 0], grids[seconds > 0]
    positions, deltas = _Positions(tokens_per_second).get_rope_index(
        torch.tensor(ids),
        torch.tensor((ids == IMAGE) + 2 * (ids == VIDEO)),
        image_grid_thw=torch.tensor(images) if len(images) else None,
        video_grid_thw=torch.tensor(videos) if len(videos) else None,
        second_per_grid_ts=torch.tensor(seconds[seconds > 0]) if len(videos) else None,
        attention_mask=torch.tensor(mask),
    )
    return [p[:, m > 0].numpy() for p, m in zip(positions.swapaxes(0, 1), mask, strict=True)], deltas[:, 0].tolist()


def test_a_thousand_random_prompts():
    rng = np.random.default_rng(0)
    count = kinds = ends = 0
    while count < 1000:
        prompts = [random_prompt(rng) for _ in range(rng.integers(1, 5))]
        rate = int(rng.choice([2, 4, 25]))
        expected = their_positions(prompts, rng.choice(["left", "right"]), rate)
        for (tokens, grids, seconds), theirs, delta in zip(prompts, *expected, strict=True):
            positions, offset = mrope_positions(
                tokens, grids, image_token_id=IMAGE, video_token_id=VIDEO, seconds_per_grid=seconds, tokens_per_second=rate
            )
            np.testing.assert_array_equal(positions, theirs)
            assert offset == delta
            count += 1
            kinds |= 1 << (2 * (IMAGE in tokens) + (VIDEO in tokens))
            touching = bool(np.any(tokens[1:] + tokens[:-1] == IMAGE + VIDEO))
            ends |= (tokens[0] >= IMAGE) + 2 * (tokens[-1] >= IMAGE) + 4 * touching
    assert kinds == 15  # text, images, videos and mixtures were among them
    assert ends == 7  # and some that begin with one, end with one, or have two next to each other


def test_a_video_without_seconds_has_a_grid_a_second_as_there():
    tokens, grids = np.array([1, *[VIDEO] * 6, 2]), np.array([[3, 2, 4]])
    theirs, _ = _Positions(2).get_rope_index(
        torch.tensor(tokens)[None], torch.tensor(2 * (tokens == VIDEO))[None], video_grid_thw=torch.tensor(grids)
    )
    ours, _ = mrope_positions(tokens, grids, image_token_id=IMAGE, video_token_id=VIDEO)
    np.testing.assert_array_equal(ours, theirs[:, 0])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_no_cut_and_no_extra_placeholder_goes_unnoticed(seed, data):
    """A prompt that lost a stretch at either end keeps its images whole, or is refused."""
    tokens, grids, _ = random_prompt(np.random.default_rng(seed))
    spans = vision_spans(tokens, grids, {IMAGE, VIDEO})
    for (begin, end), grid in zip(spans, grids, strict=True):
        assert end - begin == grid.prod() // 4 and set(tokens[begin:end]) <= {IMAGE, VIDEO}
    cut = data.draw(st.integers(1, len(tokens)))
    for left in (tokens[cut:], tokens[:-cut], np.append(tokens, IMAGE), np.append(VIDEO, tokens)):
        if np.isin(left, [IMAGE, VIDEO]).sum() == np.isin(tokens, [IMAGE, VIDEO]).sum():
            assert len(vision_spans(left, grids, {IMAGE, VIDEO})) == len(grids)
            continue
        with pytest.raises(DataError, match="problem p3: [0-9]+ image tokens for [0-9]+ image features of"):
            vision_spans(left, grids, {IMAGE, VIDEO}, problem_id="p3")


@pytest.mark.parametrize(
    "tokens, grids, message",
    [
        ([1, IMAGE, IMAGE, 2], [[1, 4, 4]], "problem p3: 2 image tokens for 4 image features of 1 images of sizes 56x56"),
        ([1, IMAGE], [], "problem p3: 1 image tokens for 0 image features of 0 images"),
        ([IMAGE, 1, IMAGE], [[1, 2, 4]], "do not stand in one run an image"),
        ([IMAGE, VIDEO], [[1, 2, 4]], "do not stand in one run an image"),
        ([VIDEO, 1], [[2, 2, 2]], r"1 image tokens for 2 image features of 1 images of sizes 28x28 \(4 frames\)"),
    ],
)
def test_a_mismatch_names_problem_sizes_and_both_counts(tokens, grids, message):
    with pytest.raises(DataError, match=message):
        mrope_positions(
            np.array(tokens), np.array(grids, int).reshape(-1, 3), image_token_id=IMAGE, video_token_id=VIDEO,
            problem_id="p3",
        )  # fmt: skip
