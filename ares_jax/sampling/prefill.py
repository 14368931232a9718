"""Prompts on their way into the cache: padded to few shapes, run some layers, or some tokens, at a time."""

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.sampling.growing_tree import Group
from ares_jax.sampling.options import EngineOptions
from ares_jax.sampling.programs import PrefillChunk, Prompts
from ares_jax.sampling.shapes import bucket, prompt_sizes, prompts_together, sizes, smallest
from data_pipeline.vision_layout import vision_layout


@dataclass(eq=False)
class PrefillJob:
    """Prompts of one shape on their way through the model."""

    groups: list[Group]  # row by row
    prompts: Prompts
    parts: list[PrefillChunk]
    x: Any = None  # what the next part takes
    done: int = 0  # parts

    def drop(self, group: Group) -> bool:
        """What is still to come of a group goes to the trash. Returns whether anybody else is left."""
        for row in (row for row, other in enumerate(self.groups) if other is group):
            pages = self.prompts.pages.copy()  # a part that is under way may read it
            pages[row] = 0
            self.prompts = self.prompts._replace(pages=pages)
        return bool(self.prompts.pages.any())

    def restart(self) -> None:
        self.x, self.done = None, 0


class PromptShapes:
    """The shapes that prompts are padded to."""

    def __init__(self, options: EngineOptions, patch_unit: int):
        """`patch_unit`: patches that the vision tower merges into a token."""
        self._page_size, self._batch = options.page_size, 1 if options.one_shape else options.prefill_batch
        self._chunk = options.prefill_chunk
        self._tokens = prompt_sizes(options.max_prompt_tokens, options.page_size, options.prefill_chunk)
        self._patches = (0, *sizes(options.max_prompt_patches, patch_unit))

    def jobs(self, groups: Sequence[Group], parts: Callable[[Prompts], list[PrefillChunk]]) -> list[PrefillJob]:
        """Returns the prompts by shape, each in the smallest that holds it.

        Never in a larger one that holds its neighbours: sums over other paddings round differently, and a prompt must give
        the same bits whatever comes with it.
        """
        shapes: dict[tuple[int, int], list[Group]] = collections.defaultdict(list)
        for group in groups:
            tokens, patches = len(group.request.token_ids), len(group.request.patches)
            shapes[smallest(self._tokens, tokens), smallest(self._patches, patches)].append(group)
        jobs = []
        for (length, space), alike in shapes.items():
            together = prompts_together(length, self._chunk, self._batch)
            for begin in range(0, len(alike), together):
                batch = alike[begin : begin + together]
                prompts = self._padded(batch, length, space)
                longest = max(len(group.request.token_ids) for group in batch)
                jobs.append(PrefillJob(batch, prompts, [part for part in parts(prompts) if part.start < longest]))
        return jobs

    def _padded(self, groups: Sequence[Group], length: int, space: int) -> Prompts:
        rows = bucket(len(groups), self._batch, smallest=1)
        tokens = np.zeros((rows, length), np.int32)
        segments, positions = np.zeros_like(tokens), np.zeros((rows, 3, length), np.int32)
        pages = np.zeros((rows, length // self._page_size), np.int32)
        patches = np.zeros((rows, space, groups[0].request.patches.shape[1]), np.float32)
        places = np.zeros((rows, space, 2), np.int32)
        windows, frames = np.zeros((2, rows, space), np.int32)
        for r, group in enumerate(groups):
            request, count = group.request, len(group.request.token_ids)
            tokens[r, :count], segments[r, :count], positions[r, :, :count] = request.token_ids, 1, request.positions
            pages[r, : len(group.prompt_pages)] = group.prompt_pages
            layout, size = vision_layout(request.grid_thw), len(request.patches)
            patches[r, :size], places[r, :size] = request.patches, layout.position_hw
            windows[r, :size], frames[r, :size] = layout.window_ids, layout.frame_ids
        vision = VisionInputs(patches, places, windows, frames) if space else None  # text alone needs no vision tower
        return Prompts(tokens, positions, segments, pages, vision)
