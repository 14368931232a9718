"""Rollout trees with their tokens: a leaf opens to its tokens and to the branches that left it."""

from collections.abc import Sequence
from html import escape

from ares_jax.reporting.load import RunRecords

_MOST_IN_A_LINE = 160  # tokens up to which a leaf is one line, so that a branch can stand under its place
_MOST_TOKENS = 2000  # of a leaf that are drawn: a page with all of 16,384 x 8 would not open
_KEPT_PREFIX = 12  # tokens of a long shared prefix that are repeated
_MOST_TREES = 8


def most_instructive(run: RunRecords) -> dict | None:
    """Returns the logged tree with most branches, mixed outcomes first, the latest of equals."""
    return max(run.rollouts, key=_rank, default=None)


def trees_to_show(run: RunRecords) -> list[dict]:
    """Returns the most instructive tree of all, then that of each of the latest steps, the latest first."""
    best: dict[int, dict] = {}
    for record in sorted(run.rollouts, key=_rank):
        best[record["step"]] = record
    first = most_instructive(run)
    others = [best[step] for step in sorted(best, reverse=True) if best[step] is not first]
    return [first, *others[: _MOST_TREES - 1]] if first else []


def _rank(record: dict) -> tuple[bool, int, int]:
    right = sum(leaf["correct"] for leaf in record["leaves"])
    return 0 < right < len(record["leaves"]), sum(leaf["parent"] >= 0 for leaf in record["leaves"]), record["step"]


def most_branched_leaf(record: dict) -> int:
    """Returns the index of the leaf from which most branches start."""
    parents = [leaf["parent"] for leaf in record["leaves"] if leaf["parent"] >= 0]
    return max(set(parents), key=lambda p: (parents.count(p), -p)) if parents else 0


def tree_html(record: dict, *, opened: bool) -> str:
    """Returns the tree as HTML. Token colour is entropy, an underline marks a validated window, and what a branch shares
    with its parent is grey. `opened`: all leaves are."""
    top = max((h for leaf in record["leaves"] for h in leaf["entropies"]), default=1.0) or 1.0
    long = max((len(leaf["tokens"]) for leaf in record["leaves"]), default=0) > _MOST_IN_A_LINE
    roots = (i for i, leaf in enumerate(record["leaves"]) if leaf["parent"] < 0)
    nodes = "".join(_node(record, i, top, long=long, opened=opened) for i in roots)
    return f'<div class="tree">{nodes}</div>'


def _node(record: dict, index: int, top: float, *, long: bool, opened: bool) -> str:
    leaves = record["leaves"]
    leaf = leaves[index]
    children = sorted(
        (i for i, other in enumerate(leaves) if other["parent"] == index), key=lambda i: leaves[i]["branch_position"]
    )
    start = leaf["branch_position"]
    kind = f"branch of {leaf['parent']} at token {start}" if leaf["parent"] >= 0 else "root"
    verdict = "right" if leaf["correct"] else "wrong"
    facts = [kind, verdict, f"reward {leaf['reward']:.2f}", f"{len(leaf['tokens'])} tokens"]
    facts += [f"{len(children)} branch{'es' * (len(children) > 1)}"] if children else []
    below = "".join(_node(record, i, top, long=long, opened=opened) for i in children)
    return (
        f'<details class="node"{" open" * opened}><summary class="{verdict}">{index} {", ".join(facts)}</summary>'
        f"{_leaf(leaf, top, long=long)}{below}</details>"
    )


def _leaf(leaf: dict, top: float, *, long: bool) -> str:
    start = leaf["branch_position"]
    cut = max(0, start - _KEPT_PREFIX) if long else 0
    shared = "\u2026 " * bool(cut) + "".join(leaf["tokens"][cut:start])
    drawn = {**leaf, "tokens": leaf["tokens"][: start + _MOST_TOKENS]}
    marks = ["w" if mark else "" for mark in leaf["window_mask"]]
    tokens = tokens_html(drawn, top, marks, start=start, one_line=True)
    left = len(leaf["tokens"]) - len(drawn["tokens"])
    rest = f'<span class="shared"> \u2026 {left} more tokens</span>' if left else ""
    prefix = f'<span class="shared">{escape(_one_line(shared))}</span><span class="fork">&#8627;</span>' if start else ""
    return f'<div class="leaf{" long" * long}"><code>{prefix}{tokens}{rest}</code></div>'


def tokens_html(leaf: dict, top: float, marks: Sequence[str], *, start: int = 0, one_line: bool = False) -> str:
    """Returns the tokens of a leaf from `start` on, coloured by entropy; `top` nats is the full colour.

    Args:
      leaf: its "tokens", "entropies" and "window_means".
      marks: CSS classes of each token.
      one_line: line breaks are drawn as a sign.
    """
    parts = []
    for at in range(start, len(leaf["tokens"])):
        text, entropy = leaf["tokens"][at], leaf["entropies"][at]
        mark = f' class="{marks[at]}"' if marks[at] else ""
        title = f"entropy {entropy:.2f}, window {leaf['window_means'][at]:.2f}"
        colour = f"background:rgba(224,120,62,{min(1.0, entropy / top):.2f})"
        parts.append(f'<span{mark} style="{colour}" title="{title}">{escape(_one_line(text) if one_line else text)}</span>')
    return "".join(parts)


def _one_line(text: str) -> str:
    """Returns `text` with its line breaks drawn: a leaf stays one line, so that a branch stands under its place."""
    return text.replace("\n", "\u23ce")
