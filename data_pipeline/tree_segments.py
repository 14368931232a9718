"""A rollout tree as one packed segment: the prompt and every shared prefix stand there once.

The leaves are put in the order of a walk through the tree, so that those below a token are neighbours: `first_leaf` and
`last_leaf` of the token. A token sees what stands before it in its segment and lies on its way to the root: what has all
leaves below it that the token itself has. (Tree attention, arXiv 2305.09781, section 4.2, for training.)
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from data_pipeline.packing import TREE_EXTRAS, Segment
from data_pipeline.prompts import Prompt


def tree_segment(
    prompt: Prompt,
    responses: Sequence[Int[np.ndarray, "N"]],
    parents: Sequence[int],
    branch_positions: Sequence[int],
    extras: Sequence[Mapping[str, Shaped[np.ndarray, "N"]]],
) -> Segment:
    """Returns the tree of the leaves `responses`.

    Args:
      responses: of each leaf from the root, the prefix shared with its parent included.
      parents: index of the parent leaf, smaller than the leaf's own; -1 for a root.
      branch_positions: index of the leaf's first own token; 0 for a root.
      extras: per-token arrays of each leaf. A shared token takes those of the leaf that owns it, the first in the walk. On
        the prompt they are 0.

    The segment's own extras, int32: `back`, how many places before a token the one stands that predicts it; `first_leaf`
    and `last_leaf`, the numbers of the leaves below the token.
    """
    owners: list[np.ndarray] = []
    for leaf, (response, parent, start) in enumerate(zip(responses, parents, branch_positions, strict=True)):
        own = np.full(len(response), leaf)
        if parent >= 0:
            own[:start] = owners[parent][:start]
        owners.append(own)
    # Bytes of big-endian numbers sort as the numbers do, and quickly: responses have thousands of tokens.
    walk = sorted(range(len(owners)), key=lambda leaf: owners[leaf].astype(">u4").tobytes())
    shared = [0, *(_common(owners[a], owners[b]) for a, b in itertools.pairwise(walk))]
    return _segment(prompt, responses, owners, extras, list(zip(walk, shared, strict=True)))


def _common(a: Int[np.ndarray, "N"], b: Int[np.ndarray, "M"]) -> int:
    """Returns how many tokens two leaves share."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if differ.size else length


def _segment(prompt, responses, owners, extras, walk: list[tuple[int, int]]) -> Segment:
    """`walk`: the leaves in order, each with the number of tokens that it shares with the one before."""
    length = len(prompt.token_ids)
    size = length + sum(len(owners[leaf]) - shared for leaf, shared in walk)
    tokens, depth = np.zeros(size, np.int32), np.zeros(size, np.int32)
    back, first, last = np.ones(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
    values = {name: np.zeros(size, value.dtype) for name, value in extras[0].items()}
    tokens[:length] = prompt.token_ids
    back[0], last[:length] = 0, len(walk) - 1
    place, end = np.zeros(0, int), length
    for number, (leaf, shared) in enumerate(walk):
        here = slice(end, end + len(owners[leaf]) - shared)
        place = np.concatenate([place[:shared], np.arange(here.start, here.stop)])
        tokens[here], depth[here] = responses[leaf][shared:], np.arange(shared, len(place))
        back[end : end + 1] = end - (place[shared - 1] if shared else length - 1)
        first[here] = number
        last[place] = number
        for name, value in extras[leaf].items():
            values[name][here] = value[shared:]
        end = here.stop
    after = np.broadcast_to(length + depth[length:] + prompt.rope_delta, (3, size - length))
    positions = np.concatenate([prompt.positions, after], axis=1).astype(np.int32)
    return Segment(
        tokens, positions, prompt.patches, prompt.grid_thw,
        values | dict(zip(TREE_EXTRAS, (back, first, last), strict=True)), prompt.problem_id,
    )  # fmt: skip
