"""Packs variable-length segments into rows of few fixed shapes, so that a learner compiles few programs.

Two budgets at once: tokens and pixel patches of a row. Trees are cut between leaves where that fills rows.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int, Shaped

from data_pipeline import micro_batch
from data_pipeline.errors import DataError
from data_pipeline.micro_batch import FIELDS, MODEL_FIELDS, PATCH_VALUES, TREE_FIELDS, MicroBatch
from data_pipeline.pixels import PixelPatches
from data_pipeline.placeholders import grid_sizes, vision_spans
from data_pipeline.prompts import Prompt
from data_pipeline.row_plan import Part, plan_rows
from data_pipeline.vision_layout import vision_layout

PATCHES_PER_TOKEN = 4  # that the vision tower merges


@dataclass(frozen=True)
class Segment:
    """One sequence with its images, or a tree of sequences (data_pipeline/tree_segments.py)."""

    token_ids: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "3 T"]
    patches: PixelPatches | Float[np.ndarray, "P V"]
    grid_thw: Int[np.ndarray, "I 3"]
    token_fields: Mapping[str, Shaped[np.ndarray, "T"]] = field(default_factory=dict)  # those of `MicroBatch`, or others
    problem_id: str = "?"  # for errors


def response_segment(
    prompt: Prompt, response: Int[np.ndarray, "N"], fields: Mapping[str, Shaped[np.ndarray, "N"]]
) -> Segment:
    """Returns prompt and response as one segment; the fields, given for the response, are 0 on the prompt."""
    tokens = len(prompt.token_ids)
    after = np.broadcast_to(np.arange(tokens, tokens + len(response)) + prompt.rope_delta, (3, len(response)))
    return Segment(
        np.concatenate([prompt.token_ids, response]).astype(np.int32),
        np.concatenate([prompt.positions, after], axis=1).astype(np.int32),
        prompt.patches,
        prompt.grid_thw,
        {name: np.concatenate([np.zeros(tokens, value.dtype), value]) for name, value in fields.items()},
        prompt.problem_id,
    )


def empty_segment(dtypes: Mapping[str, np.dtype]) -> Segment:
    """Returns a tree of one token that counts nothing, with fields of these types."""
    kinds = dict(dtypes) | dict.fromkeys(TREE_FIELDS, np.dtype(np.int32))
    return Segment(
        np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.zeros((0, PATCH_VALUES), np.float32),
        np.zeros((0, 3), np.int32), {name: np.zeros(1, kind) for name, kind in kinds.items()},
    )  # fmt: skip


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
) -> "MicroBatches":
    """Returns micro-batches that hold every segment once: full ones, then at most one of each smaller shape of `shapes`.

    A micro-batch holds the model's fields of `MicroBatch`, for B = rows, T = row_tokens, P = row_patches, and the segments'
    own as [B, T], padded with 0.

    Args:
      segments: those with `TREE_FIELDS` are trees. Where one is cut, it stands in several rows, each with what leads to its
        leaves; `loss_mask` then says in which of them a token counts.
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
    rows_of = [list(itertools.islice(filled, s.rows)) for s in chosen]
    made = [_fill(rows, s, segments[0].token_fields) for rows, s in zip(rows_of, chosen, strict=True)]
    shown = [[[segment.patches for segment in row] for row in rows] for rows in rows_of]
    return MicroBatches(made, shown, [(s.rows, s.row_patches, segments[0].patches.shape[1]) for s in chosen])


class MicroBatches(Sequence[MicroBatch]):
    """Micro-batches whose patches are cut when one is asked for: the host holds the patches of one at a time."""

    def __init__(self, made: Sequence[MicroBatch], patches: Sequence[Any], shapes: Sequence[tuple[int, int, int]]):
        """`made`: without patches; `patches`: of each one's rows, those of their segments; `shapes`: of the patches."""
        self._made, self._patches, self._shapes = made, patches, shapes

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return MicroBatches(self._made[index], self._patches[index], self._shapes[index])
        patches = np.zeros(self._shapes[index], np.float32)
        for row, segments in zip(patches, self._patches[index], strict=False):
            begin = 0
            for some in segments:
                row[begin : begin + len(some)] = some
                begin += len(some)
        return cast(MicroBatch, {**self._made[index], "patches": patches})

    @property
    def padding(self) -> float:
        """The share of their tokens that is nothing."""
        used = sum((batch["segment_ids"] > 0).sum() for batch in self._made)
        return float(1 - used / sum(batch["segment_ids"].size for batch in self._made))


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


def shapes(rows: int, row_tokens: int, row_patches: int, *, halvings: int, parts: int) -> list[Shape]:
    """Returns the shape of a full micro-batch, its half, its quarter, ...: half the rows if they can still be split into
    `parts`, otherwise rows half as long, with patches for whole tokens."""
    found = [Shape(rows, row_tokens, row_patches)]
    for _ in range(halvings):
        s = found[-1]
        fewer = s.rows % (2 * parts) == 0
        patches = max(s.row_patches // (2 * PATCHES_PER_TOKEN) * PATCHES_PER_TOKEN, min(s.row_patches, PATCHES_PER_TOKEN))
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
    if TREE_FIELDS[0] not in segment.token_fields:
        return np.array([[0, len(segment.token_ids)], [0, 0]])
    first, last = segment.token_fields["first_leaf"], segment.token_fields["last_leaf"]
    n = int(last.max()) + 1
    count = np.bincount(first * n + last, minlength=n * n).reshape(n, n)
    runs = np.zeros((n + 1, n + 1), np.int64)
    runs[:n, 1:] = count[:, ::-1].cumsum(axis=1)[:, ::-1].cumsum(axis=0).T  # that begin before b and end at a or later
    return np.triu(runs, 1)


def _run(segment: Segment, start: int, stop: int) -> Segment:
    """Returns the leaves `start` to `stop - 1` of a tree. What they share with earlier ones counts there."""
    if TREE_FIELDS[0] not in segment.token_fields:
        return segment
    offset, first, last = (segment.token_fields[name] for name in TREE_FIELDS)
    kept = (first < stop) & (last >= start)
    place = np.cumsum(kept) - 1
    old = np.flatnonzero(kept)
    tree = (
        place[old] - place[old - offset[old]],
        np.maximum(first[old], start) - start,
        np.minimum(last[old], stop - 1) - start,
    )
    fields = {name: value[old] for name, value in segment.token_fields.items()}
    fields |= {name: value.astype(np.int32) for name, value in zip(TREE_FIELDS, tree, strict=True)}
    if "loss_mask" in fields:
        fields["loss_mask"] = fields["loss_mask"] & (first[old] >= start)
    return replace(segment, token_ids=segment.token_ids[old], positions=segment.positions[:, old], token_fields=fields)


def _fill(plan: list[list[Segment]], shape: Shape, fields: Mapping[str, np.ndarray]) -> MicroBatch:
    rows, row_tokens, row_patches = shape
    sizes = micro_batch.shapes(MODEL_FIELDS, rows=rows, row_tokens=row_tokens, row_patches=row_patches)
    del sizes["patches"]
    batch: dict[str, np.ndarray] = {name: np.zeros(*size) for name, size in sizes.items()}
    for name, value in fields.items():
        if name in FIELDS and value.dtype != FIELDS[name].dtype:
            raise ValueError(f"field {name} has type {value.dtype}, a micro-batch's has {np.dtype(FIELDS[name].dtype)}")
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
            for name, value in segment.token_fields.items():
                batch[name][r, span] = value
            token = span.stop
        layout = vision_layout(np.concatenate([s.grid_thw for s in members]))
        count = len(layout.window_ids)
        batch["patch_positions"][r, :count] = layout.position_hw
        batch["patch_window_ids"][r, :count] = layout.window_ids
        batch["patch_frame_ids"][r, :count] = layout.frame_ids
    return cast(MicroBatch, batch)
