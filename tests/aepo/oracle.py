"""A slow float64 NumPy version of AEPO, written from method.md alone: loops and definitions, no code shared."""

import numpy as np


def window_mean(entropy, t, w):
    return sum(entropy[t : t + w]) / w


def tau(trajectories, definition, q, w):
    if definition == "trajectory":
        return np.mean([np.percentile(h, 100 * q) for h in trajectories])
    means = [[window_mean(h, t, w) for t in range(len(h) - w + 1)] for h in trajectories if len(h) >= w]
    return np.median([np.percentile(m, 100 * q) for m in means])


def validated(entropy, tokens, vocabulary, tau, w):
    """A window starts at t if there are w tokens from t on; it is validated if high, and if token t is in V_sem."""
    fits = [t + w <= len(entropy) for t in range(len(entropy))]
    return [fit and window_mean(entropy, t, w) >= tau and tokens[t] in vocabulary for t, fit in enumerate(fits)]


def bucket(k, group, rule="paper"):
    easy, medium = {"paper": (6 / 8, 3 / 8), "released": (2 / 3, 1 / 3)}[rule]
    return 0 if k / group >= easy else 1 if k / group >= medium else 2


def released(n, target, d, correct, alpha):
    f, k, temp, c = [(0.15, 2, 2, 1), (0.25, 3, 2.5, 1), (0.35, 4, 3, 1.2)][d]
    delta, cap = n - target, alpha * c
    margin = max(1, f * max(target, 1))

    def huber(x):
        x = max(x, 0)
        return x * x / (2 * k) if x <= k else x - k / 2

    def sat(x):
        return 1 / (1 + np.exp(-x / temp))

    if not correct:
        return [0.6, 0.8, 1.0][d] * cap * sat(max(delta - margin, 0))
    if d == 0:
        return -min(cap, huber(delta - margin) / (margin + k) * cap)
    if d == 1:
        return -min(cap, huber(abs(delta) - margin) / (margin + k) * cap)
    if delta >= -margin:
        return cap * sat(delta + margin)
    return -min(cap, 0.5 * huber(-delta - margin) / (margin + k) * cap)


def paper(n, target, d, correct, mean, variance, scale, most=np.inf, easy_excess=0.0):
    """`most` bounds lambda; `easy_excess` is the cap of the case study's penalty, the released one's for easy and right."""
    if correct:
        return released(n, target, d, correct, easy_excess) if d == 0 else 0.0
    delta = n - target
    g = [max(0, delta), abs(delta), max(0, -delta)][d]
    lam = max(0, ((target - mean) if d == 2 else (mean - target)) / (variance + 1e-6))
    return -scale * min(lam, most) * g


def overlong(length, limit, buffer):
    if not buffer or length <= limit - buffer:
        return 0.0
    return (limit - buffer - length) / buffer if length <= limit else -1.0


def rewards(groups, targets, alphas, shaping, rule, *, scale, most, easy_excess, limit, buffer, penalty):
    """Of groups of leaves (windows, right?, length, root?): each group's bucket and its leaves' rewards.

    Bucket, mean and variance are those of the roots. `targets` per bucket; None: nothing was measured yet, so the mean of
    these groups.
    """
    levels = []
    for leaves in groups:
        of_roots = [right for _, right, _, root in leaves if root]
        levels.append(bucket(sum(of_roots), len(of_roots), rule))
    counts = [
        [n for d, leaves in zip(levels, groups, strict=True) if d == k for n, _, _, root in leaves if root] for k in range(3)
    ]
    out = []
    for d, leaves in zip(levels, groups, strict=True):
        target = np.mean(counts[d]) if targets[d] is None else targets[d]
        shapes = {
            "none": lambda n, right: 0.0,
            "released": lambda n, right, d=d, target=target: released(n, target, d, right, alphas[d]),
            "paper": lambda n, right, d=d, target=target: paper(
                n, target, d, right, np.mean(counts[d]), np.var(counts[d]), scale, most, easy_excess
            ),
        }
        out.append(
            [right + shapes[shaping](n, right) + penalty * overlong(length, limit, buffer) for n, right, length, _ in leaves]
        )
    return levels, out


def advantages(rewards, groups, baseline):
    out = []
    for r, g in zip(rewards, groups, strict=True):
        mates = [x for x, other in zip(rewards, groups, strict=True) if other == g]
        if len(mates) == 1:
            out.append(0.0)
        elif baseline == "grpo":
            out.append((r - np.mean(mates)) / (np.std(mates, ddof=1) + 1e-6))
        else:
            out.append(r - (sum(mates) - r) / (len(mates) - 1))
    return np.array(out)


def path(leaf, t, parents, starts):
    """Who owns token t of a leaf: walk up while the token lies before the branch point."""
    while parents[leaf] >= 0 and t < starts[leaf]:
        leaf = parents[leaf]
    return leaf


def subtree_advantages(lengths, parents, starts, advantages):
    """The mean advantage of all leaves that pass through the same owner's token."""
    values, owned = [], []
    for leaf, n in enumerate(lengths):
        row, own = np.zeros(n), np.zeros(n, bool)
        for t in range(n):
            owner = path(leaf, t, parents, starts)
            below = [
                a for other, a in enumerate(advantages) if t < lengths[other] and path(other, t, parents, starts) == owner
            ]
            row[t], own[t] = np.mean(below), owner == leaf
        values.append(row)
        owned.append(own)
    return values, owned


def split_advantages(rewards, parents, starts, lengths, first_roots):
    """Values of prefixes, each a tuple of tokens (the leaf that owns it, its place), as method.md has it, but for one thing.

    A first root is compared with the other first roots alone: test_tree_advantages.py shows that it has to be.
    """
    paths = []
    for leaf, (parent, start) in enumerate(zip(parents, starts, strict=True)):
        paths.append((*paths[parent][:start], *((leaf, n) for n in range(start, lengths[leaf]))) if parent >= 0 else
                     tuple((leaf, n) for n in range(lengths[leaf])))  # fmt: skip

    def continuations(prefix):
        """The values of what follows a prefix: of each next token, and of each leaf that ends with it."""
        after = {path[len(prefix)] for path in paths if path[: len(prefix)] == prefix and len(path) > len(prefix)}
        values = {token: value((*prefix, token)) for token in after}
        return values | {("end", leaf): rewards[leaf] for leaf, path in enumerate(paths) if path == prefix}

    def value(prefix):
        return np.mean(list(continuations(prefix).values()))

    roots = [leaf for leaf, parent in enumerate(parents) if parent < 0]
    tops = {leaf: value(paths[leaf][:1]) for leaf in roots}
    advantages, weights = [], []
    for leaf, path in enumerate(paths):
        weight, near = 1.0, None
        first = path[0][0] in roots[:first_roots]
        others = [tops[root] for root in (roots[:first_roots] if first else roots) if (root, 0) != path[0]]
        mine = np.zeros((2, len(path)))
        for n in range(len(path)):
            after = continuations(path[:n]) if n else {}
            if len(after) > 1:
                weight /= len(after)
                near = np.mean([v for token, v in after.items() if token != path[n]])
            far = np.mean(others) if others else near
            base = far or 0.0 if near is None else (near + far) / 2
            if path[n][0] == leaf:
                mine[:, n] = value(path[: n + 1]) - base, weight
        advantages.append(mine[0])
        weights.append(mine[1])
    return advantages, weights


def local_advantages(rewards, parents, starts, lengths, first_roots):
    """Children add their own tokens alone; everything is compared with the first roots."""
    first = [leaf for leaf, parent in enumerate(parents) if parent < 0][:first_roots]
    values, weights = [], []
    for leaf, (parent, start, n) in enumerate(zip(parents, starts, lengths, strict=True)):
        if parent >= 0:
            value = 0.5 * (rewards[leaf] - (0.5 * rewards[parent] + 0.5 * np.mean(rewards[first])))
        else:
            others = [rewards[other] for other in first if other != leaf]
            value = rewards[leaf] - (np.mean(others) if others else 0.0)
        values.append(np.full(n, value))
        weights.append((np.arange(n) >= start) * 1.0)
    return values, weights


def kl(log_p, log_ref, estimator):
    d = np.clip(log_ref - log_p, -20, 20)
    value = {"k1": -d, "abs": abs(d), "mse": d * d / 2, "k3": np.exp(d) - d - 1}[estimator]
    return np.clip(value, -10, 10)


def surrogate(log_p, old, advantage, low, high, dual):
    ratio = np.exp(np.clip(log_p - old, -20, 20))
    value = max(-advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high))
    return min(value, -advantage * dual) if advantage < 0 else value


def loss(log_p, old, advantage, mask, low, high, dual, reduction):
    rows = [
        [surrogate(*x, low, high, dual) for *x, m in zip(lp, o, a, mk, strict=True) if m]
        for lp, o, a, mk in zip(log_p, old, advantage, mask, strict=True)
    ]
    if reduction == "token":
        tokens = [x for row in rows for x in row]
        return np.mean(tokens) if tokens else 0.0
    return np.mean([np.mean(row) for row in rows if row]) if any(rows) else 0.0


def controller(kappa, observed, target, rate, low, high):
    return np.clip(kappa * (1 + rate * (observed / target - 1)), low, high)


def update(tokens, *, low, high, dual, cap, estimator):
    """The loss of an update and its sums, of KL per bucket. A token is a dict; bucket 1, 2, 3, or 0 if it does not count.

    Without `old` the ratio is to the sampler's own log-probs and needs no correction.
    """
    total = dict.fromkeys(["loss", "tokens", "entropy", "mismatch", "clip_high", "clip_low", "clip_dual"], 0.0)
    total |= {name: np.zeros(3) for name in ("kl", "kl_tokens", "control_kl", "control_tokens")}
    for x in tokens:
        if x["bucket"] == 0:
            continue
        log_p, sampled, a = x["log_prob"], x["old_log_prob"], x["advantage"]
        old, correction, other = sampled, 1.0, log_p
        if "old" in x:
            old = other = x["old"]
            correction = min(np.exp(np.clip(old - sampled, -20, 20)), cap)
        distance = kl(log_p, x["reference"], estimator)
        term = correction * surrogate(log_p, old, a, low, high, dual) + x["kl_weight"] * distance
        total["loss"] += x["weight"] * term
        total["tokens"] += 1
        total["entropy"] += x["entropy"]
        total["mismatch"] += abs(other - sampled)
        ratio = np.exp(np.clip(log_p - old, -20, 20))
        total["clip_high"] += a > 0 and ratio > 1 + high
        total["clip_low"] += a < 0 and ratio < 1 - low
        total["clip_dual"] += a < 0 and ratio > dual
        total["kl"][x["bucket"] - 1] += distance
        total["kl_tokens"][x["bucket"] - 1] += 1
        if not x["in_window"]:
            total["control_kl"][x["bucket"] - 1] += distance
            total["control_tokens"][x["bucket"] - 1] += 1
    return total
