"""Videos as frames, and their patches: two frames next to each other in time make one grid of patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Video:
    """Frames of one size, `fps` of them a second."""

    frames: Sequence[UInt8[np.ndarray, "H W 3"]]
    fps: float = 2.0

    def __post_init__(self):
        sizes = sorted({frame.shape for frame in self.frames})
        if len(sizes) != 1 or not self.fps > 0:
            raise DataError(
                f"video of {len(self.frames)} frames of sizes {[size[:2] for size in sizes]} at {self.fps} frames a second; "
                "give frames of one size and a rate above 0"
            )


def video_patches(image_processor, video: Video) -> tuple[Float[np.ndarray, "P 1176"], Int[np.ndarray, "3"], float]:
    """Returns patches, grid (pairs of frames, rows, columns) and the seconds that one pair covers.

    Every frame goes through the image processor, as transformers' own video processor needs torchvision. The last frame
    of an odd number is repeated.
    """
    together = image_processor.temporal_patch_size
    frames = [*video.frames, *[video.frames[-1]] * (-len(video.frames) % together)]
    features = image_processor(frames, return_tensors="np", input_data_format="channels_last")
    _, rows, columns = features["image_grid_thw"][0].tolist()
    # The processor shows an image as `together` equal frames; one of each is kept and joined with its neighbours'.
    size = image_processor.patch_size**2
    alone = features["pixel_values"].reshape(-1, together, rows * columns, 3, together, size)[:, :, :, :, 0]
    patches = np.moveaxis(alone, 1, 3).reshape(-1, 3 * together * size)
    return patches.astype(np.float32), np.array([len(alone), rows, columns], np.int32), together / video.fps
