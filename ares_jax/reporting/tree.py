"""One rollout tree drawn with its tokens: every leaf a line, a branch set in under the place where it left its parent."""

from html import escape

from ares_jax.reporting.load import Run


def most_instructive(run: Run) -> dict | None:
    """Returns the logged tree with most branches, mixed outcomes first, the latest of equals."""

    def rank(record: dict):
        right = sum(leaf["correct"] for leaf in record["leaves"])
        return 0 < right < len(record["leaves"]), sum(leaf["parent"] >= 0 for leaf in record["leaves"]), record["step"]

    return max(run.rollouts, key=rank, default=None)


def most_branched_leaf(record: dict) -> int:
    """Returns the index of the leaf from which most branches start."""
    parents = [leaf["parent"] for leaf in record["leaves"] if leaf["parent"] >= 0]
    return max(set(parents), key=lambda p: (parents.count(p), -p)) if parents else 0


def tree_html(record: dict) -> str:
    """Returns the tree as HTML: token colour is entropy, an underline marks a validated window, the shared prefix of a
    branch is blank."""
    top = max((h for leaf in record["leaves"] for h in leaf["entropies"]), default=1.0) or 1.0
    order = []
    for root, leaf in enumerate(record["leaves"]):
        if leaf["parent"] < 0:
            children = [i for i, other in enumerate(record["leaves"]) if other["parent"] == root]
            order += [root, *sorted(children, key=lambda i: record["leaves"][i]["branch_position"])]
    lines = [_leaf(record, index, top) for index in order]
    return f'<div class="tree">{"".join(lines)}</div>'


def _leaf(record: dict, index: int, top: float) -> str:
    leaf = record["leaves"][index]
    start = leaf["branch_position"]
    shared = _one_line("".join(leaf["tokens"][:start]))
    parts = []
    for at in range(start, len(leaf["tokens"])):
        strength = min(1.0, leaf["entropies"][at] / top)
        mark = " class=w" if leaf["window_mask"][at] else ""
        title = f"entropy {leaf['entropies'][at]:.2f}, window {leaf['window_means'][at]:.2f}"
        token = escape(_one_line(leaf["tokens"][at]))
        parts.append(f'<span{mark} style="background:rgba(224,120,62,{strength:.2f})" title="{title}">{token}</span>')
    kind = f"branch of {leaf['parent']}" if leaf["parent"] >= 0 else "root"
    verdict = "right" if leaf["correct"] else "wrong"
    prefix = f"<span class=shared>{escape(shared)}</span><span class=fork>&#8627;</span>" if start else ""
    return (
        f'<div class="leaf"><span class="name {verdict}">{index} {kind}, {verdict}, reward {leaf["reward"]:.2f}</span>'
        f"<code>{prefix}{''.join(parts)}</code></div>"
    )


def _one_line(text: str) -> str:
    """Returns `text` with its line breaks drawn: a leaf stays one line, so that a branch stands under its place."""
    return text.replace("\n", "\u23ce")
