"""Image and video placeholders counted against the features they stand for, before anything runs.

The model gives its n-th feature to the n-th placeholder. One too many or too few, and every later image would be read
in the wrong place; so prompts are checked where they are made and again where the sampler takes them in.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import DataError


def vision_spans(
    token_ids: Int[np.ndarray, "T"],
    grid_thw: Int[np.ndarray, "I 3"],
    placeholder_ids: Collection[int],
    *,
    problem_id: str = "?",
    merge_size: int = 2,
) -> list[tuple[int, int]]:
    """Returns where the placeholders of each image or video begin and end, in the order of the grids.

    `grid_thw` counts pairs of frames (1: an image), rows and columns of patches; merge_size x merge_size patches make a
    feature.
    Raises `DataError`, naming problem, sizes and both counts, unless each grid has one unbroken run of one placeholder
    and no placeholder is left over.
    """
    token_ids, grids = np.asarray(token_ids), np.asarray(grid_thw).reshape(-1, 3)
    counts = (grids.prod(axis=1) // merge_size**2).tolist()
    places = np.flatnonzero(np.isin(token_ids, list(placeholder_ids)))
    if len(places) != sum(counts):
        raise DataError(
            f"problem {problem_id}: {len(places)} image tokens for {sum(counts)} image features of {_sizes(grids)}; "
            "encode text and images together, and keep placeholder tokens out of the text"
        )
    spans, taken = [], 0
    for count in counts:
        span = places[taken : taken + count]
        if not count or span[-1] - span[0] >= count or len(set(token_ids[span].tolist())) > 1:
            raise DataError(
                f"problem {problem_id}: the {len(places)} image tokens for {sum(counts)} image features of {_sizes(grids)} "
                f"do not stand in one run an image ({count} from token {span[0] if count else 0} on); do not cut a prompt"
            )
        spans.append((int(span[0]), int(span[-1]) + 1))
        taken += count
    return spans


def _sizes(grids: Int[np.ndarray, "I 3"], patch_size: int = 14) -> str:
    names = [f"{h * patch_size}x{w * patch_size}" + (f" ({t} frame pairs)" if t > 1 else "") for t, h, w in grids.tolist()]
    return f"{len(names)} images of sizes {', '.join(names)} (height x width)" if names else "0 images"
