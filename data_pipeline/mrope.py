"""Multimodal rotary positions of Qwen2.5-VL: text advances one axis for all three, an image spans height and width.

Source: Qwen2-VL, arXiv 2409.12191, section 2.1; integer-equal to transformers' `get_rope_index` (tested).
"""

import numpy as np
from jaxtyping import Int


def mrope_positions(
    token_ids: Int[np.ndarray, "T"], grid_thw: Int[np.ndarray, "I 3"], *, image_token_id: int, merge_size: int = 2
) -> tuple[Int[np.ndarray, "3 T"], int]:
    """Returns the positions (time, height, width) of every token, and the offset of what follows them.

    `grid_thw` counts patches, in the order of the images; a text token at index i >= T has position i + offset.
    Raises `ValueError` where the image tokens are not as many as the grids say.
    """
    positions = np.zeros((3, len(token_ids)), np.int32)
    is_image = np.asarray(token_ids) == image_token_id
    index = start = 0
    for frames, rows, columns in np.asarray(grid_thw).tolist():
        shape = frames, rows // merge_size, columns // merge_size
        count = int(np.prod(shape))
        first = index + int(np.argmax(is_image[index:])) if is_image[index:].any() else len(token_ids)
        if not is_image[first : first + count].all() or first + count > len(token_ids):
            raise ValueError(f"image of grid {frames}x{rows}x{columns} needs {count} image tokens at {first}; not there")
        positions[:, index:first] = start + np.arange(first - index)
        start += first - index
        positions[:, first : first + count] = start + np.indices(shape).reshape(3, -1)
        start += max(rows, columns) // merge_size
        index = first + count
    if is_image[index:].any():
        raise ValueError(f"{int(is_image[index:].sum())} image tokens without an image after index {index}")
    positions[:, index:] = start + np.arange(len(token_ids) - index)
    end = int(positions.max()) + 1 if len(token_ids) else 0
    return positions, end - len(token_ids)
