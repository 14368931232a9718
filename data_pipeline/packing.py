"""Packs variable-length segments into rows of one fixed shape, so that a learner compiles one program.

First-fit-decreasing over two budgets at once: tokens and pixel patches of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Shaped

from data_pipeline.errors import DataError
from data_pipeline.prompts import Prompt
from data_pipeline.vision_layout import vision_layout


@dataclass(frozen=True)
class Segment:
    """One sequence with its images. `extras` are per-token arrays that travel with it."""

    token_ids: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "3 T"]
    patches: Float[np.ndarray, "P 1176"]
    grid_thw: Int[np.ndarray, "I 3"]
    extras: Mapping[str, Shaped[np.ndarray, "T"]] = field(default_factory=dict)


def response_segment(
    prompt: Prompt, response: Int[np.ndarray, "N"], extras: Mapping[str, Shaped[np.ndarray, "N"]]
) -> Segment:
    """Returns prompt and response as one segment; the extras, given for the response, are 0 on the prompt."""
    tokens = len(prompt.token_ids)
    after = np.broadcast_to(np.arange(tokens, tokens + len(response)) + prompt.rope_delta, (3, len(response)))
    return Segment(
        np.concatenate([prompt.token_ids, response]).astype(np.int32),
        np.concatenate([prompt.positions, after], axis=1).astype(np.int32),
        prompt.patches,
        prompt.grid_thw,
        {name: np.concatenate([np.zeros(tokens, value.dtype), value]) for name, value in extras.items()},
    )


def pack(
    segments: Sequence[Segment], *, row_tokens: int, row_patches: int, rows: int
) -> list[dict[str, Shaped[np.ndarray, "B ..."]]]:
    """Returns batches of exactly `rows` rows that hold every segment once.

    A batch holds, for B = rows, T = row_tokens, P = row_patches:
      tokens [B, T] int32; segment_ids [B, T] int32 (0 padding, then 1, 2, ... in a row); positions [B, 3, T] int32;
      patches [B, P, 1176] float32; patch_positions [B, P, 2], patch_window_ids [B, P], patch_frame_ids [B, P] int32;
      and every extra as [B, T], padded with 0. The patches of a row stand in the order of its image tokens.

    Raises:
      DataError: a segment alone is larger than a row.
    """
    plan = plan_rows(
        [len(s.token_ids) for s in segments], [len(s.patches) for s in segments],
        row_tokens=row_tokens, row_patches=row_patches,
    )  # fmt: skip
    return [
        _fill([[segments[i] for i in row] for row in plan[start : start + rows]], rows, row_tokens, row_patches)
        for start in range(0, len(plan), rows)
    ]


def plan_rows(tokens: Sequence[int], patches: Sequence[int], *, row_tokens: int, row_patches: int) -> list[list[int]]:
    """Returns the segments' indices row by row; deterministic. Raises `DataError` as `pack` does."""
    order = sorted(range(len(tokens)), key=lambda i: (-max(tokens[i] / row_tokens, patches[i] / row_patches), i))
    plan: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in order:
        need = tokens[index], patches[index]
        if need[0] > row_tokens or need[1] > row_patches:
            raise DataError(
                f"segment {index} has {need[0]} tokens and {need[1]} patches; a row holds {row_tokens} and {row_patches}: "
                "raise packing.row_tokens or packing.row_patches"
            )
        row = next((r for r, left in enumerate(free) if need[0] <= left[0] and need[1] <= left[1]), None)
        if row is None:
            row = len(plan)
            plan.append([])
            free.append((row_tokens, row_patches))
        plan[row].append(index)
        free[row] = free[row][0] - need[0], free[row][1] - need[1]
    return plan


def _fill(plan: list[list[Segment]], rows: int, row_tokens: int, row_patches: int) -> dict[str, np.ndarray]:
    batch: dict[str, np.ndarray] = {
        "tokens": np.zeros((rows, row_tokens), np.int32),
        "segment_ids": np.zeros((rows, row_tokens), np.int32),
        "positions": np.zeros((rows, 3, row_tokens), np.int32),
        "patches": np.zeros((rows, row_patches, 1176), np.float32),
        "patch_positions": np.zeros((rows, row_patches, 2), np.int32),
        "patch_window_ids": np.zeros((rows, row_patches), np.int32),
        "patch_frame_ids": np.zeros((rows, row_patches), np.int32),
    }
    for name, value in plan[0][0].extras.items():
        batch[name] = np.zeros((rows, row_tokens), value.dtype)
    for r, members in enumerate(plan):
        token = 0
        for number, segment in enumerate(members, start=1):
            span = slice(token, token + len(segment.token_ids))
            batch["tokens"][r, span] = segment.token_ids
            batch["segment_ids"][r, span] = number
            batch["positions"][r, :, span] = segment.positions
            for name, value in segment.extras.items():
                batch[name][r, span] = value
            token = span.stop
        layout = vision_layout(np.concatenate([s.grid_thw for s in members]))
        count = len(layout.window_ids)
        batch["patches"][r, :count] = np.concatenate([s.patches for s in members])
        batch["patch_positions"][r, :count] = layout.position_hw
        batch["patch_window_ids"][r, :count] = layout.window_ids
        batch["patch_frame_ids"][r, :count] = layout.frame_ids
    return batch
