"""The patches of videos: two frames next to each other in time make one grid of patches."""

import numpy as np
from jaxtyping import Int, UInt8

RAW = {"do_rescale": False, "do_normalize": False}  # options of an image processor: pixels as they are, in its own patches


def video_pixels(
    image_processor, frames: UInt8[np.ndarray, "F H W 3"]
) -> tuple[UInt8[np.ndarray, "P 3 2 S"], Int[np.ndarray, "1 3"]]:
    """Returns the pixels of the patches, and the grid (pairs of frames, rows, columns). The last frame of an odd number
    stands twice.

    Every frame goes through the image processor, as transformers' own video processor needs torchvision; the two scale
    alike but for rounding (torchvision does not round between rows and columns). Raises `ValueError` as it does.
    """
    together = image_processor.temporal_patch_size
    whole = [*frames, *[frames[-1]] * (-len(frames) % together)]
    features = image_processor(whole, return_tensors="np", input_data_format="channels_last", **RAW)
    _, rows, columns = features["image_grid_thw"][0].tolist()
    # The processor shows a still image as `together` equal frames; one of each is kept and joined with its neighbours'.
    size = image_processor.patch_size**2
    alone = features["pixel_values"].reshape(-1, together, rows * columns, 3, together, size)[:, :, :, :, 0]
    patches = np.moveaxis(alone, 1, 3).reshape(-1, 3, together, size)
    return patches.astype(np.uint8), np.array([[len(alone), rows, columns]], np.int32)
