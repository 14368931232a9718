"""Multimodal rotary positions of Qwen2.5-VL: text advances all three axes as one, an image spans height and width, a
video also time, in proportion to its seconds.

Source: Qwen2-VL, arXiv 2409.12191, section 2.1; integer-equal to transformers' `get_rope_index` (tested).
"""

import numpy as np
from jaxtyping import Float, Int

from data_pipeline.placeholders import vision_spans


def mrope_positions(
    token_ids: Int[np.ndarray, "T"],
    grid_thw: Int[np.ndarray, "I 3"],
    *,
    image_token_id: int,
    video_token_id: int | None = None,
    seconds_per_grid: Float[np.ndarray, "I"] | None = None,
    tokens_per_second: int = 2,
    merge_size: int = 2,
    problem_id: str = "?",
) -> tuple[Int[np.ndarray, "3 T"], int]:
    """Returns the positions (time, height, width) of every token, and the offset of what follows them.

    `grid_thw` counts patches, in the order in which images and videos stand in the text; a text token at index i >= T
    has position i + offset. `seconds_per_grid` is the time that one of a video's T grids covers, 1 s where it is not
    given; an image's entry is not read.
    Raises `DataError` where the placeholders are not as many as the grids say.
    """
    kinds = {image_token_id} if video_token_id is None else {image_token_id, video_token_id}
    spans = vision_spans(token_ids, grid_thw, kinds, problem_id=problem_id, merge_size=merge_size)
    seconds = np.ones(len(spans), np.float32) if seconds_per_grid is None else np.asarray(seconds_per_grid, np.float32)
    positions = np.zeros((3, len(token_ids)), np.int32)
    index = start = 0
    for (first, end), grid, duration in zip(spans, np.asarray(grid_thw).tolist(), seconds, strict=True):
        frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
        positions[:, index:first] = start + np.arange(first - index)
        start += first - index
        time, height, width = np.indices((frames, rows, columns)).reshape(3, -1)
        if token_ids[first] == video_token_id:  # float32 before truncation, as there
            time = (time.astype(np.float32) * (np.float32(tokens_per_second) * duration)).astype(np.int32)
        positions[:, first:end] = start + np.stack([time, height, width])
        start += max(rows, columns)
        index = end
    positions[:, index:] = start + np.arange(len(token_ids) - index)
    following = int(positions.max()) + 1 if len(token_ids) else 0
    return positions, following - len(token_ids)
