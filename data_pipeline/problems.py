"""A problem: what a source holds and a prompt is made of."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer."""

    problem_id: str
    source: str  # data set it comes from: target lengths are per source
    level: str  # nominal family: "easy", "medium", "hard"
    question: str  # <image> and <video> in it say where each stands; without them they stand before the text
    images: tuple[UInt8[np.ndarray, "H W 3"], ...]
    answer: str
    responses: tuple[str, ...] = ()  # teacher traces, may be empty
    videos: tuple[UInt8[np.ndarray, "F H W 3"], ...] = ()
    video_fps: tuple[float, ...] = ()  # frames a second of each video; empty: 2
