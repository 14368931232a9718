"""A rollout tree as one packed segment: the prompt and every shared prefix stand there once.

The tree's tokens come in the order of `tree_layout`. A token sees what stands before it in its segment and lies on its way
to the root: what has all leaves below it that the token itself has. (Tree attention, arXiv 2305.09781, section 4.2, for
training.)
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Shaped

from data_pipeline.packing import TREE_FIELDS, Segment
from data_pipeline.prompts import Prompt


def tree_segment(
    prompt: Prompt,
    token_ids: Int[np.ndarray, "N"],
    first_leaf: Int[np.ndarray, "N"],
    last_leaf: Int[np.ndarray, "N"],
    predictor: Int[np.ndarray, "N"],
    fields: Mapping[str, Shaped[np.ndarray, "N"]],
) -> Segment:
    """Returns prompt and tree as one segment. The fields, given for the tree, are 0 on the prompt.

    The segment's own fields, int32: `predictor_offset`, how many places before a token the one stands that predicts it;
    `first_leaf` and `last_leaf`, the numbers of the leaves below the token.
    """
    length = len(prompt.token_ids)
    depth = np.arange(len(token_ids))
    for begin in np.flatnonzero(predictor != depth - 1):  # of a leaf's own tokens
        depth[begin:] += (depth[predictor[begin]] + 1 if predictor[begin] >= 0 else 0) - depth[begin]
    after = np.broadcast_to(length + depth + prompt.rope_delta, (3, len(depth)))
    positions = np.concatenate([prompt.positions, after], axis=1).astype(np.int32)
    offset = np.ones(length + len(depth), np.int32)
    offset[0], offset[length:] = 0, np.arange(len(depth)) - predictor
    first = np.concatenate([np.zeros(length, np.int32), first_leaf])
    last = np.concatenate([np.full(length, last_leaf.max(initial=0), np.int32), last_leaf])
    own = {name: np.concatenate([np.zeros(length, value.dtype), value]) for name, value in fields.items()}
    return Segment(
        np.concatenate([prompt.token_ids, token_ids]).astype(np.int32), positions, prompt.patches, prompt.grid_thw,
        own | dict(zip(TREE_FIELDS, (offset, first, last), strict=True)), prompt.problem_id,
    )  # fmt: skip
