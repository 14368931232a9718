"""Packs variable-length segments into rows of few fixed shapes, so that a learner compiles few programs.

Two budgets at once: tokens and pixel patches of a row. Trees are cut between leaves where that fills rows.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from data_pipeline.errors import DataError
from data_pipeline.placeholders import grid_sizes, vision_spans
from data_pipeline.prompts import Prompt
from data_pipeline.row_plan import Part, plan_rows
from data_pipeline.vision_layout import vision_layout

MERGED = 4  # patches that the vision tower makes one token of
# Of a segment that is a tree (data_pipeline/tree_segments.py).
TREE_EXTRAS = ("back", "first_leaf", "last_leaf")


@dataclass(frozen=True)
class Segment:
    """One sequence with its images, or a tree of sequences. `extras` are per-token arrays that travel with it."""

    token_ids: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "3 T"]
    patches: Float[np.ndarray, "P 1176"]
    grid_thw: Int[np.ndarray, "I 3"]
    extras: Mapping[str, Shaped[np.ndarray, "T"]] = field(default_factory=dict)
    problem_id: str = "?"  # for errors


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
        prompt.problem_id,
    )


def _alone(value: Any) -> list[Any]:
    return [value]


class Shape(NamedTuple):
    """Of a micro-batch: its rows, and what each holds."""

    rows: int
    row_tokens: int
    row_patches: int


def pack(
    segments: Sequence[Segment],
    *,
    rows: int,
    row_tokens: int,
    row_patches: int,
    halvings: int = 0,
    parts: int = 1,
    gather: Callable[[Any], list[Any]] = _alone,
    placeholder_ids: Collection[int] | None = None,
) -> list[dict[str, Shaped[np.ndarray, "B ..."]]]:
    """Returns micro-batches that hold every segment once: full ones, then at most one of each smaller shape of `shapes`.

    A micro-batch holds, for B = rows, T = row_tokens, P = row_patches:
      tokens [B, T] int32; segment_ids [B, T] int32 (0 padding, then 1, 2, ... in a row); positions [B, 3, T] int32;
      patches [B, P, 1176] float32; patch_positions [B, P, 2], patch_window_ids [B, P], patch_frame_ids [B, P] int32;
      and every extra as [B, T], padded with 0. The patches of a row stand in the order of its image tokens.

    Args:
      segments: those with the extras `TREE_EXTRAS` are trees. Where one is cut, it stands in several rows, each with what
        leads to its leaves; other extras are then 0 at what another row has, too.
      parts: into how many the rows are split, one a device.
      gather: returns what each process gave, to all: they then get micro-batches of the same shapes.
      placeholder_ids: the tokens that the model gives features to, counted in every segment; without it, nobody counts.

    Raises:
      DataError: a segment, or a leaf of one, is larger than a row, or its placeholders do not match its features.
    """
    if placeholder_ids is not None:
        for segment in segments:
            check_placeholders(segment, placeholder_ids)
    sizes, patches = [leaf_runs(s) for s in segments], [len(s.patches) for s in segments]
    for index, (size, count) in enumerate(zip(sizes, patches, strict=True)):
        longest = int(np.diagonal(size, 1).max())
        if longest > row_tokens or count > row_patches:
            raise DataError(
                f"segment {index} has {longest} tokens and {count} patches; a row holds {row_tokens} and {row_patches}: "
                "raise packing.row_tokens or packing.row_patches"
            )
    choices = shapes(rows, row_tokens, row_patches, halvings=halvings, parts=parts)
    chosen, plan = plan_batches(sizes, patches, choices, gather)
    filled = iter([[_run(segments[i], start, stop) for i, start, stop in row] for row in plan])
    return [_fill(list(itertools.islice(filled, s.rows)), s, segments[0].extras) for s in chosen]


def check_placeholders(segment: Segment, placeholder_ids: Collection[int]) -> None:
    """Raises `DataError`, naming problem, sizes and both counts, unless each image has its placeholders, and no other is
    there: a response that drew one would give every later segment of its row another's features."""
    vision_spans(segment.token_ids, segment.grid_thw, placeholder_ids, problem_id=segment.problem_id)
    if (patches := int(segment.grid_thw.prod(axis=1).sum())) != len(segment.patches):
        raise DataError(
            f"problem {segment.problem_id}: {len(segment.patches)} image patches for {grid_sizes(segment.grid_thw)}, which "
            f"have {patches}; encode text and images together"
        )


def plan_batches(
    sizes: Sequence[Int[np.ndarray, "N N"]],
    patches: Sequence[int],
    choices: Sequence[Shape],
    gather: Callable[[Any], list[Any]] = _alone,
) -> tuple[list[Shape], list[list[Part]]]:
    """Returns the shapes of the micro-batches, as few tokens as there is a plan for, and what stands in their rows.

    Args:
      sizes, patches: of each segment, as `plan_rows` takes them.
      choices: of a full micro-batch, its half, its quarter, ...
    """

    def planned(budget: int) -> list[list[Part]] | None:
        return plan_rows(sizes, patches, [s[1:] for s in micro_batch_shapes(budget, choices) for _ in range(s.rows)])

    # Counted in the smallest shape's share of a full micro-batch: with full ones there is a plan, with less there may be.
    plan = plan_rows(sizes, patches, itertools.repeat(choices[0][1:]))
    halvings = len(choices) - 1
    budget = most = -(-len(plan or []) // choices[0].rows) << halvings
    for less in range(most - (1 << halvings) + 1, most):
        if (found := planned(less)) is not None:
            budget, plan = less, found
            break
    if (joint := max(gather(budget))) > budget:
        plan = planned(joint)
    while not all(gather(plan is not None)):
        joint += 1
        plan = planned(joint)
    return micro_batch_shapes(joint, choices), plan or []


def padding_share(batches: Sequence[Mapping[str, Shaped[np.ndarray, "B ..."]]]) -> float:
    """Returns which share of the batches' tokens is nothing."""
    return 1 - sum((b["segment_ids"] > 0).sum() for b in batches) / sum(b["segment_ids"].size for b in batches)


def shapes(rows: int, row_tokens: int, row_patches: int, *, halvings: int, parts: int) -> list[Shape]:
    """Returns the shape of a full micro-batch, its half, its quarter, ...: half the rows if they can still be split into
    `parts`, otherwise rows half as long, with patches for whole tokens."""
    found = [Shape(rows, row_tokens, row_patches)]
    for _ in range(halvings):
        s = found[-1]
        fewer = s.rows % (2 * parts) == 0
        patches = max(s.row_patches // (2 * MERGED) * MERGED, min(s.row_patches, MERGED))
        shorter = Shape(s.rows, s.row_tokens // 2, patches)
        found.append(s._replace(rows=s.rows // 2) if fewer else shorter)
    return found


def micro_batch_shapes(budget: int, choices: Sequence[Shape]) -> list[Shape]:
    """Returns the micro-batches that together have `budget` times the last choice; each is twice as much as the next."""
    halvings = len(choices) - 1
    smaller = [shape for i, shape in enumerate(choices[1:], 1) if budget >> (halvings - i) & 1]
    return [choices[0]] * (budget >> halvings) + smaller


def leaf_runs(segment: Segment) -> Int[np.ndarray, "N N"]:
    """Returns, for n leaves [n + 1, n + 1]: at [a, b] the tokens of leaves a to b - 1 as one segment. No tree: one leaf."""
    if TREE_EXTRAS[0] not in segment.extras:
        return np.array([[0, len(segment.token_ids)], [0, 0]])
    first, last = segment.extras["first_leaf"], segment.extras["last_leaf"]
    n = int(last.max()) + 1
    count = np.bincount(first * n + last, minlength=n * n).reshape(n, n)
    runs = np.zeros((n + 1, n + 1), np.int64)
    runs[:n, 1:] = count[:, ::-1].cumsum(axis=1)[:, ::-1].cumsum(axis=0).T  # that begin before b and end at a or later
    return np.triu(runs, 1)


def _run(segment: Segment, start: int, stop: int) -> Segment:
    """Returns the leaves `start` to `stop - 1` of a tree. What they share with earlier ones counts there."""
    if TREE_EXTRAS[0] not in segment.extras:
        return segment
    back, first, last = (segment.extras[name] for name in TREE_EXTRAS)
    kept = (first < stop) & (last >= start)
    place = np.cumsum(kept) - 1
    old = np.flatnonzero(kept)
    tree = (
        place[old] - place[old - back[old]],
        np.maximum(first[old], start) - start,
        np.minimum(last[old], stop - 1) - start,
    )
    owned = first[old] >= start
    extras = {name: np.where(owned, value[old], 0).astype(value.dtype) for name, value in segment.extras.items()}
    extras |= {name: value.astype(np.int32) for name, value in zip(TREE_EXTRAS, tree, strict=True)}
    return replace(segment, token_ids=segment.token_ids[old], positions=segment.positions[:, old], extras=extras)


def _fill(plan: list[list[Segment]], shape: Shape, extras: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows, row_tokens, row_patches = shape
    batch: dict[str, np.ndarray] = {
        "tokens": np.zeros((rows, row_tokens), np.int32),
        "segment_ids": np.zeros((rows, row_tokens), np.int32),
        "positions": np.zeros((rows, 3, row_tokens), np.int32),
        "patches": np.zeros((rows, row_patches, 1176), np.float32),
        "patch_positions": np.zeros((rows, row_patches, 2), np.int32),
        "patch_window_ids": np.zeros((rows, row_patches), np.int32),
        "patch_frame_ids": np.zeros((rows, row_patches), np.int32),
    }
    for name, value in extras.items():
        batch[name] = np.zeros((rows, row_tokens), value.dtype)
    for r, members in enumerate(plan):
        if not members:
            continue
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
