"""Live leaves as the rows of a decode call, and what it drew back into the leaves."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from ares_jax.sampling.growing_tree import Leaf
from ares_jax.sampling.programs import DecodeOutput, DecodeState
from ares_jax.sampling.stops import tokens_until_stop


def page_table(leaves: Sequence[Leaf], rows: int, width: int) -> Int[np.ndarray, "B M"]:
    """Returns the leaves' pages, row by row; the rest is page 0, the trash."""
    table = np.zeros((rows, width), np.int32)
    for r, leaf in enumerate(leaves):
        table[r, : len(leaf.pages)] = leaf.pages
    return table


def to_rows(leaves: Sequence[Leaf], count: int, window: int) -> DecodeState:
    """Returns `count` rows: the leaves, and then some that are not alive."""
    rows = DecodeState(
        token=np.zeros(count, np.int32), length=np.zeros(count, np.int32), response_index=np.zeros(count, np.int32),
        alive=np.zeros(count, bool), rope_delta=np.zeros(count, np.int32), end=np.zeros(count, np.int32),
        key=np.zeros((count, 2), np.uint32), temperature=np.ones(count, np.float32),
        top_p=np.ones(count, np.float32), top_k=np.zeros(count, np.int32),
        tau_high=np.full(count, np.inf, np.float32), ring=np.zeros((count, window), np.float32),
        ring_tokens=np.zeros((count, window), np.int32),
    )  # fmt: skip
    for r, leaf in enumerate(leaves):
        request, n = leaf.group.request, leaf.count
        rows.token[r] = leaf.columns["token_ids"][n - 1] if n else request.token_ids[-1]
        rows.length[r], rows.response_index[r], rows.alive[r] = leaf.cached, n, True
        rows.rope_delta[r], rows.end[r] = request.rope_delta, request.max_new_tokens
        rows.key[r] = leaf.group.keys[leaf.index]
        rows.temperature[r], rows.top_p[r], rows.top_k[r] = request.temperature, request.top_p, request.top_k
        rows.tau_high[r] = request.tau_high
        seen = min(n, window)
        if seen:
            rows.ring[r, window - seen :] = leaf.columns["entropies"][n - seen : n]
            rows.ring_tokens[r, window - seen :] = leaf.columns["token_ids"][n - seen : n]
    return rows


def record(
    leaves: Sequence[Leaf], drawn: DecodeOutput, *, window: int, eos: Collection[int], table: Sequence[bytes], version: int
) -> int:
    """Appends to the leaves what their rows drew, with weights of that version, up to the first stop string.

    `table`: the bytes of each token. Returns how many tokens that is.
    """
    counts = drawn.valid.sum(axis=0)
    reach, total = window - 1, 0
    for r, leaf in enumerate(leaves):
        new, n = int(counts[r]), leaf.count
        leaf.columns["token_ids"][n : n + new] = drawn.token[:new, r]
        end = None
        if stops := leaf.group.stops:
            end = tokens_until_stop(leaf.columns["token_ids"][: n + new], stops, table, seen=n)
            new = new if end is None else end - n
        own, begun = slice(n, n + new), max(0, n - reach)
        leaf.columns["log_probs"][own] = drawn.log_prob[:new, r]
        leaf.columns["entropies"][own] = drawn.entropy[:new, r]
        leaf.columns["policy_version"][own] = version
        ended = slice(begun, max(begun, n + new - reach))  # a window that ends at s began at s - w + 1
        skip = begun - (n - reach)
        leaf.columns["window_means"][ended] = drawn.window_mean[skip:new, r]
        leaf.columns["window_mask"][ended] = drawn.window_hit[skip:new, r]
        leaf.count += new
        leaf.cached += new
        total += new
        stopped = end is not None or int(leaf.columns["token_ids"][leaf.count - 1]) in eos
        leaf.done = stopped or leaf.count >= leaf.group.request.max_new_tokens
        leaf.reason = "stop" if stopped else "length"
    return total
