"""Where each pixel patch stands, and with which others it attends, in Qwen2.5-VL's vision tower.

Patches stay in the image processor's order (every four consecutive ones merge into one token). Attention does not mind
the order, so nothing is permuted: two patches attend to each other iff their ids are equal.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class VisionLayout:
    """Ids start at 1 and are unique over the images; 0 is for padding."""

    position_hw: Int[np.ndarray, "P 2"]  # row and column of the patch in its frame
    window_ids: Int[np.ndarray, "P"]  # patches of one attention window
    frame_ids: Int[np.ndarray, "P"]  # patches of one frame (full attention)


def vision_layout(
    grid_thw: Int[np.ndarray, "I 3"], *, window_size: int = 112, patch_size: int = 14, merge_size: int = 2
) -> VisionLayout:
    """Returns the layout of all patches of the images with these grids (frames, rows, columns of patches)."""
    side = window_size // patch_size  # patches along a window
    positions, windows, frames = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    next_window = next_frame = 1
    for count, rows, columns in np.asarray(grid_thw).tolist():
        row, column = np.indices((rows, columns))
        blocks = (rows // merge_size, merge_size, columns // merge_size, merge_size)
        row, column = (a.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for a in (row, column))
        across = -(-columns // side)
        window = (row // side) * across + column // side
        per_frame = across * -(-rows // side)
        for _ in range(count):
            positions.append(np.stack([row, column], axis=1).astype(np.int32))
            windows.append((window + next_window).astype(np.int32))
            frames.append(np.full(rows * columns, next_frame, np.int32))
            next_window += per_frame
            next_frame += 1
    return VisionLayout(np.concatenate(positions), np.concatenate(windows), np.concatenate(frames))
