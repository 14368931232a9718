"""Image and video placeholders counted against the features they stand for, before anything runs.

The model gives its n-th feature to the n-th placeholder. One too many or too few, and every later image would be read
in the wrong place; so prompts are checked where they are made, again where the sampler takes them in, and with their
responses where the learner does. Every error names the problem, the sizes of its images and both counts.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import DataError
from data_pipeline.problems import Problem


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
            f"problem {problem_id}: {len(places)} image tokens for {sum(counts)} image features of {grid_sizes(grids)}; "
            "encode text and images together, and keep placeholder tokens out of texts and responses"
        )
    spans, taken = [], 0
    for count in counts:
        span = places[taken : taken + count]
        if not count or span[-1] - span[0] >= count or len(set(token_ids[span].tolist())) > 1:
            first = span[0] if count else 0
            raise DataError(
                f"problem {problem_id}: the {len(places)} image tokens for {sum(counts)} image features of "
                f"{grid_sizes(grids)} do not stand in one run an image ({count} from token {first} on); do not cut a prompt"
            )
        spans.append((int(span[0]), int(span[-1]) + 1))
        taken += count
    return spans


def grid_sizes(grid_thw: Int[np.ndarray, "I 3"], patch_size: int = 14) -> str:
    """Returns how many images and videos there are and how large each is, as the model sees them."""
    grids = np.asarray(grid_thw).reshape(-1, 3).tolist()
    return _sizes("image", [(2 * t if t > 1 else 1, h * patch_size, w * patch_size) for t, h, w in grids])


def problem_sizes(problem: Problem, kind: str = "") -> str:
    """Returns the same of a problem, as it holds them: of its images and videos, or of one `kind` ("image", "video")."""
    images = [(1, *image.shape[:2]) for image in problem.images]
    videos = [video.shape[:3] for video in problem.videos]
    return _sizes(kind or "image", {"image": images, "video": videos}.get(kind, images + videos))


def _sizes(kind: str, shapes: Iterable[Sequence[int]]) -> str:
    names = [f"{height}x{width}" + (f" ({frames} frames)" if frames > 1 else "") for frames, height, width in shapes]
    return f"{len(names)} {kind}s" + (f" of sizes {', '.join(names)} (height x width)" if names else "")
