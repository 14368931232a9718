"""Branching against independent sampling at equal computed tokens, on the hard problems of a digits run's test split.

    python -m benchmarks.equal_tokens --config=configs/digits_cpu.py --workdir=runs/digits --stage=cold_start

Needs the run's checkpoint of that stage. Every problem gets trees as AEPO draws them, and independent samples. Of these,
as many count as cost what the tree cost: whole samples, the last one with the chance that makes the expected tokens equal.
A second comparison takes as many samples as the tree has leaves. The prompt is computed once either way and left out.
Intervals: 95 %, bootstrap over problems (a problem's draws are averaged first); differences are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict

from ares_jax.aepo.windows import batch_threshold
from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.rewards.grading import is_correct
from ares_jax.run.run import open_run
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory
from data_pipeline.prompts import Prompt

_STAGE = flags.DEFINE_string("stage", "cold_start", "whose weights sample: base, cold_start or aepo")
_LEVEL = flags.DEFINE_string("level", "hard", "level of the problems")
_PROBLEMS = flags.DEFINE_integer("problems", 200, "problems of that level")
_DRAWS = flags.DEFINE_integer("draws", 8, "trees, and sets of samples, for each problem")

MEASURES = {
    "leaves": "responses delivered",
    "computed": "response tokens computed",
    "ratio": "computed for each delivered token",
    "saved": "tokens saved by sharing",
    "branches": "branches",
    "solved": "problem solved at least once",
    "correct": "correct responses",
    "distinct": "distinct correct responses",
    "mixed": "right and wrong ones in the group",
}
Row = dict[str, float]


def main(config: ConfigDict, workdir: Path) -> None:
    run, a = open_run(config, workdir), config.aepo
    prompts = [p for p in run.prompts("test") if p.level == _LEVEL.value][: _PROBLEMS.value]
    if not prompts:
        raise UserError(f"--level={_LEVEL.value}: data.test has no such problem; levels are easy, medium and hard")

    def requests(draw: int, **how):
        s, size = config.sampler, how.pop("group_size")
        return [
            rollout_request(
                prompt, seed=derive_seed(config.seed, "branching", str(how), draw, prompt.problem_id), group_size=size,
                max_new_tokens=s.max_response_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, **how,
            )
            for prompt in prompts
        ]  # fmt: skip

    rng = np.random.default_rng(config.seed)
    rows: dict[str, list[list[Row]]] = {name: [] for name in ("branching", "equal tokens", "equal leaves")}
    with run.sampler() as client:
        client.push_weights(run.host_params(run.params(_STAGE.value)), 0)
        # More than the tree has leaves: short samples are many for the same tokens.
        independent = [client.rollouts(requests(d, group_size=2 * a.group_size)) for d in range(_DRAWS.value)]
        entropies = [leaf.entropies for groups in independent for group in groups for leaf in group.leaves]
        tau = batch_threshold(entropies, definition=a.tau_definition, quantile=a.tau_quantile, window=a.window)
        for draw, samples in enumerate(independent):
            tree = {"max_branches_per_sequence": a.max_branches_per_sequence, "tau_high": tau}
            trees = client.rollouts(requests(draw, group_size=a.group_size, root_leaves=a.root_leaves, **tree))
            rows["branching"].append([measured(p, g.leaves, run.decode) for p, g in zip(prompts, trees, strict=True)])
            chosen = [equal_tokens(one, tree, rng) for one, tree in zip(samples, trees, strict=True)]
            rows["equal tokens"].append([measured(p, c, run.decode) for p, c in zip(prompts, chosen, strict=True)])
            same = [one.leaves[: a.group_size] for one in samples]
            rows["equal leaves"].append([measured(p, c, run.decode) for p, c in zip(prompts, same, strict=True)])
    print(
        f"\n{len(prompts)} {_LEVEL.value} problems, {_DRAWS.value} draws each, weights of {_STAGE.value}, group of "
        f"{a.group_size} with {a.root_leaves} roots, tau {tau:.3f} nats ({a.tau_definition}, {a.tau_quantile:g})\n"
    )
    print(table(rows, rng))


def equal_tokens(samples: RolloutTree, tree: RolloutTree, rng: np.random.Generator) -> list[Trajectory]:
    """Returns the first samples, in number such that their expected tokens are those that the tree computed."""
    left = sum(len(leaf.token_ids) - leaf.branch_position for leaf in tree.leaves)
    chosen: list[Trajectory] = []
    for leaf in samples.leaves:
        if rng.random() >= left / len(leaf.token_ids):  # below 1 for the last one alone
            return chosen
        chosen.append(leaf)
        left -= len(leaf.token_ids)
        if left <= 0:
            return chosen
    raise UserError(f"problem {tree.problem_id}: {len(samples.leaves)} samples are fewer tokens than its tree; draw more")


def measured(prompt: Prompt, leaves: Sequence[Trajectory], decode: Callable[[Sequence[int]], str]) -> Row:
    """Returns what `MEASURES` names, of one set of responses."""
    right = [is_correct(decode(leaf.token_ids.tolist()), prompt.answer) for leaf in leaves]
    delivered = sum(len(leaf.token_ids) for leaf in leaves)
    saved = sum(leaf.branch_position for leaf in leaves)
    return {
        "leaves": len(leaves), "computed": delivered - saved, "delivered": delivered, "saved": saved,
        "branches": sum(leaf.parent >= 0 for leaf in leaves), "solved": any(right), "correct": sum(right),
        "distinct": len({tuple(leaf.token_ids) for leaf, ok in zip(leaves, right, strict=True) if ok}),
        "mixed": any(right) and not all(right),
    }  # fmt: skip


def table(rows: Mapping[str, Sequence[Sequence[Row]]], rng: np.random.Generator, *, resamples: int = 2000) -> str:
    """Returns the Markdown table: means a problem and draw, with intervals, and branching minus each other row.

    `rows`: for each method, for each draw, one `measured` for each problem.
    """
    names = list(next(iter(rows.values()))[0][0])
    values = {
        method: {name: np.mean([[float(row[name]) for row in draw] for draw in draws], axis=0) for name in names}
        for method, draws in rows.items()
    }
    count = len(next(iter(values.values()))["leaves"])
    picks = rng.integers(count, size=(resamples, count))
    first, *others = values
    differences = [f"{first} - {other}" for other in others]
    lines = [
        "| for each problem | " + " | ".join([*values, *differences]) + " |",
        "|---" * (1 + len(values) + len(others)) + "|",
    ]
    for name, text in MEASURES.items():
        means = {method: _means(of, name, picks) for method, of in values.items()}
        cells = [_cell(mean, spread) for mean, spread in means.values()]
        for other in others:
            (mean, spread), (less, its) = means[first], means[other]
            cells.append(_cell(mean - less, spread - its, signed=True))
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _means(values: Mapping[str, Float[np.ndarray, "P"]], name: str, picks) -> tuple[float, Float[np.ndarray, "R"]]:
    """Returns the mean over problems, and over each resample of them; "ratio" is one of sums."""
    if name == "ratio":
        computed, delivered = values["computed"], values["delivered"]
        return computed.sum() / delivered.sum(), computed[picks].sum(axis=1) / delivered[picks].sum(axis=1)
    return values[name].mean(), values[name][picks].mean(axis=1)


def _cell(mean: float, spread: Float[np.ndarray, "R"], *, signed: bool = False) -> str:
    low, high = np.quantile(spread, [0.025, 0.975])
    sign = "+" if signed else ""
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    cli.run(main)
