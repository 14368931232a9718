"""Is a fork's child worth as much as its parent? By both rules of branching, on a digits run's test split.

    python -m benchmarks.branching --config=configs/digits_cpu.py --workdir=runs/digits --stage=cold_start

Needs the run's checkpoint of that stage. Every fork gives one pair: whether the child's answer is right, and whether the
parent's own continuation from there is. Where forks are causal (`branching.is_causal`) both are samples of the same
distribution, and the mean difference is 0 but for chance; where they are chosen by what the parent drew next, it is not.
Intervals: 95 %, bootstrap over problems, whose trees are many. Trees have more slots than forks, so that none competes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from ares_jax.aepo.windows import batch_threshold
from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.rewards.grading import is_correct
from ares_jax.run.run import open_run
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree
from data_pipeline.prompts import Prompt

_STAGE = flags.DEFINE_string("stage", "cold_start", "whose weights sample: base, cold_start or aepo")
_LEVEL = flags.DEFINE_string("level", "hard", "level of the problems")
_FORKS = flags.DEFINE_integer("forks", 50_000, "forks by each rule, at least", 1)
_ROOTS = flags.DEFINE_integer("roots", 4, "roots of a tree", 1)
_PER_ROOT = flags.DEFINE_integer("per_root", 4, "most forks of a root", 1)

RULES = {
    "causal: first windows, at their end": ("window_end", "first"),
    "by height, at the windows' start": ("window_start", "highest"),
}
_RESAMPLES = 2000


class Forks(NamedTuple):
    """Pairs of one problem, one entry a fork."""

    child: Float[np.ndarray, "F"]  # 1 where its answer is right
    parent: Float[np.ndarray, "F"]


def main(config: ConfigDict, workdir: Path) -> None:
    run, a, s = open_run(config, workdir), config.aepo, config.sampler
    prompts = [p for p in run.prompts("test") if p.level == _LEVEL.value]
    if not prompts:
        raise UserError(f"--level={_LEVEL.value}: data.test has no such problem; levels are easy, medium and hard")

    def draw(client, number: int, **how) -> list[RolloutTree]:
        return client.rollouts(
            [
                rollout_request(
                    prompt, seed=derive_seed(config.seed, "forks", str(how), number, prompt.problem_id), **how,
                    max_new_tokens=s.max_response_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                )
                for prompt in prompts
            ]
        )  # fmt: skip

    rows = {}
    with run.sampler() as client:
        client.push_weights(run.host_params(run.params(_STAGE.value)), 0)
        entropies = [leaf.entropies for tree in draw(client, 0, group_size=8) for leaf in tree.leaves]
        tau = batch_threshold(entropies, definition=a.tau_definition, quantile=a.tau_quantile, window=a.window)
        for name, (at, choice) in RULES.items():
            found: dict[str, list[Forks]] = {prompt.problem_id: [] for prompt in prompts}
            begin, number, bar = time.time(), 0, tqdm(total=_FORKS.value, desc=name, unit="fork")
            while bar.n < _FORKS.value:
                number += 1
                trees = draw(
                    client, number, group_size=_ROOTS.value * (1 + _PER_ROOT.value), root_leaves=_ROOTS.value,
                    max_branches_per_sequence=_PER_ROOT.value, tau_high=tau, branch_at=at, branch_choice=choice,
                )  # fmt: skip
                for prompt, tree in zip(prompts, trees, strict=True):
                    found[prompt.problem_id].append(forks_of(prompt, tree, run.decode))
                    bar.update(len(found[prompt.problem_id][-1].child))
            bar.close()
            rows[name] = [Forks(*map(np.concatenate, zip(*pairs, strict=True))) for pairs in found.values()]
            print(f"{name}: {number} trees a problem, {time.time() - begin:.0f} s", flush=True)
    print(
        f"\n{len(prompts)} {_LEVEL.value} problems, weights of {_STAGE.value}, {_ROOTS.value} roots, at most "
        f"{_PER_ROOT.value} forks each, tau {tau:.3f} nats ({a.tau_definition}, {a.tau_quantile:g}), window {a.window}\n"
    )
    print(table(rows, np.random.default_rng(config.seed)))


def forks_of(prompt: Prompt, tree: RolloutTree, decode: Callable[[Sequence[int]], str]) -> Forks:
    """Returns the pairs of a tree."""
    right = np.array([is_correct(decode(leaf.token_ids.tolist()), prompt.answer) for leaf in tree.leaves], float)
    parents = np.array(tree.parents)
    children = np.flatnonzero(parents >= 0)
    return Forks(right[children], right[parents[children]])


def table(rows: dict[str, list[Forks]], rng: np.random.Generator) -> str:
    """Returns the Markdown table: a row for each rule, means over forks in percent with intervals."""
    lines = ["| rule | forks | child right | parent right | child - parent (points) |", "|---|---|---|---|---|"]
    for name, problems in rows.items():
        sums = np.array([[len(p.child), p.child.sum(), p.parent.sum()] for p in problems])
        spread = sums[rng.integers(len(sums), size=(_RESAMPLES, len(sums)))].sum(axis=1)
        count, child, parent = sums.sum(axis=0)
        cells = [
            _cell(child / count, spread[:, 1] / spread[:, 0]), _cell(parent / count, spread[:, 2] / spread[:, 0]),
            _cell((child - parent) / count, (spread[:, 1] - spread[:, 2]) / spread[:, 0], signed=True),
        ]  # fmt: skip
        lines.append(f"| {name} | {int(count):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(mean: float, spread: Float[np.ndarray, "R"], *, signed: bool = False) -> str:
    low, high = np.quantile(spread, [0.025, 0.975])
    sign = "+" if signed else ""
    return f"{100 * mean:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


if __name__ == "__main__":
    cli.run(main)
