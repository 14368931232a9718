"""The fields of a micro-batch: one table, which packing fills, learners read and the ahead-of-time compiler lays out.

B rows of T tokens and P pixel patches. A field says what it means at a token that counts; elsewhere it may hold anything,
so that whoever adds up selects first.
"""

from collections.abc import Collection
from typing import Annotated, NamedTuple, TypedDict, get_type_hints

import numpy as np

PATCH_VALUES = 1176  # of a patch: 2 frames of 14 x 14 pixels in 3 colours


class Field(NamedTuple):
    """Type and shape of a row; "T" and "P" stand for its tokens and its patches."""

    dtype: type
    shape: tuple[int | str, ...] = ("T",)


_Ids = Annotated[np.ndarray, Field(np.int32)]
_Floats = Annotated[np.ndarray, Field(np.float32)]
_Flags = Annotated[np.ndarray, Field(np.bool_)]


class MicroBatch(TypedDict, total=False):
    """Arrays of rows. Those of the model are always there, the others where a learner wants them."""

    # The model's.
    tokens: _Ids
    segment_ids: _Ids  # 0 padding, then 1, 2, ... in a row
    positions: Annotated[np.ndarray, Field(np.int32, (3, "T"))]  # mRoPE: time, height, width
    patches: Annotated[np.ndarray, Field(np.float32, ("P", PATCH_VALUES))]  # in the order of the row's image tokens
    patch_positions: Annotated[np.ndarray, Field(np.int32, ("P", 2))]
    patch_window_ids: Annotated[np.ndarray, Field(np.int32, ("P",))]
    patch_frame_ids: Annotated[np.ndarray, Field(np.int32, ("P",))]
    # Of segments that are trees.
    predictor_offset: _Ids  # how many places before a token the one stands that predicts it
    first_leaf: _Ids
    last_leaf: _Ids  # the leaves first_leaf .. last_leaf have the token
    # Of a loss.
    loss_mask: _Flags  # the token counts, here and in no other row
    weight: _Floats  # of the token in the loss
    kl_weight: _Floats  # of the KL term at the token
    # Of AEPO.
    advantage: _Floats
    old_log_prob: _Floats  # of the sampler, nats
    difficulty: _Ids  # 0, 1, 2 for easy, medium, hard
    in_window: _Flags  # inside a validated window
    # Added by a learner, of weights that the update does not change, nats.
    reference_log_prob: _Floats
    recomputed_log_prob: _Floats


FIELDS: dict[str, Field] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(MicroBatch, include_extras=True).items()
}
MODEL_FIELDS = tuple(FIELDS)[:7]
TREE_FIELDS = ("predictor_offset", "first_leaf", "last_leaf")
SFT_FIELDS = ("loss_mask", "weight", "kl_weight")
AEPO_FIELDS = (*SFT_FIELDS, "advantage", "old_log_prob", "difficulty", "in_window")


def shapes(
    names: Collection[str], *, rows: int, row_tokens: int, row_patches: int
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns shape and type of the named fields."""
    sizes = {"T": row_tokens, "P": row_patches}
    return {
        name: ((rows, *(sizes[n] if isinstance(n, str) else n for n in FIELDS[name].shape)), FIELDS[name].dtype)
        for name in names
    }
