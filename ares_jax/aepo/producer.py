"""Where the loop's trees come from: each process draws and grades its share of the prompts, and tells the others.

With `aepo.staleness = 1` a draw goes on in a thread while the learner updates. Only main threads talk to each other.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from ares_jax.aepo.filtering import keep_tree, pass_rate_histogram
from ares_jax.aepo.scoring import grade, score
from ares_jax.aepo.state import AepoState
from ares_jax.aepo.windows import trees_threshold
from ares_jax.errors import UserError
from ares_jax.lifecycle import preemption
from ares_jax.parallel.distributed import gather, interleaved, share
from ares_jax.run.run import Run
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.sampler import Sampler
from data_pipeline.prompts import Prompt
from data_pipeline.stream import Stream


class Draw(NamedTuple):
    """The trees that this process drew at one time."""

    trees: list[RolloutTree]  # graded
    state: AepoState  # they were drawn in
    seconds: float
    waited: float  # seconds of them, for prompts


class Batch(NamedTuple):
    """The trees of one iteration, of all processes."""

    drawn: list[RolloutTree]
    kept: list[RolloutTree]  # by the filter, as many as are learned from
    useful: int  # trees that the filter keeps, those that nothing is learned from included
    tokens: int  # of responses, sampled for it
    next_prompt: Any  # state of the prompts' iterator after it
    seconds: float
    waited: float  # seconds of them, for prompts


class RolloutProducer:
    """Draws for one iteration at a time; every process has one, and calls it together with the others."""

    def __init__(self, run: Run, prompts: Stream, sampler: Sampler):
        self.run, self.prompts, self.sampler = run, prompts, sampler
        self.config, self.aepo = run.config, run.config.aepo
        self.background = ThreadPoolExecutor(1)
        self._begun: Future[Draw] | None = None

    def begin(self, iteration: int, state: AepoState) -> None:
        """Starts to draw for an iteration, unless that has begun."""
        self._begun = self._begun or self.background.submit(self.draw, iteration, 0, self.aepo.prompts_per_step, state)

    def next(self, iteration: int, state: AepoState) -> Batch | None:
        """Returns the batch of an iteration; None, in all processes, if one of them was told to go meanwhile."""
        self.begin(iteration, state)
        begun, self._begun = self._begun, None
        assert begun is not None
        return self.complete(begun, iteration)

    def wait(self) -> None:
        """Returns once the draw under way, if there is one, has ended; it is broken off if a process is told to go."""
        if self._begun is not None:
            self._wait_for(self._begun)

    def close(self) -> None:
        """Breaks off what is under way: a colocated sampler's programs must not meet those that save."""
        if self._begun is not None:
            self.sampler.break_off()
        self.background.shutdown()

    def complete(self, begun: "Future[Draw]", iteration: int) -> Batch | None:
        """Scores and filters what all processes drew, and draws again until `prompts_per_step` trees survive."""
        a = self.aepo
        seconds, waited, tokens, attempt = 0.0, 0.0, 0, 0
        drawn: list[RolloutTree] = []
        kept: list[RolloutTree] = []
        while (draw := self.drawn(begun)) is not None:
            scored = self.scored(draw)
            seconds, waited = seconds + draw.seconds, waited + draw.waited
            tokens += sum(len(tree.token_ids) for tree in scored)
            drawn += scored
            kept += [tree for tree in scored if keep_tree(tree, a.filter)]
            if (useful := len(kept)) >= a.prompts_per_step:
                kept = kept[: a.prompts_per_step]
                return Batch(drawn, kept, useful, tokens, self.prompts.get_state(), seconds, waited)
            if (attempt := attempt + 1) == a.filter.attempts:
                raise UserError(
                    f"only {len(kept)} of {len(drawn)} groups had a mean {a.filter.by} within "
                    f"[{a.filter.low}, {a.filter.high}] after {attempt} attempts, {a.prompts_per_step} are needed; right "
                    f"leaves a group: {pass_rate_histogram([tree.accuracy for tree in drawn], a.group_size)}. Choose "
                    "problems nearer to the model's ability, or widen aepo.filter"
                )
            begun = self.background.submit(self.draw, iteration, attempt, a.prompts_per_step - len(kept), draw.state)
        return None

    def draw(self, iteration: int, attempt: int, missing: int, state: AepoState) -> Draw:
        """Draws and grades this process's share of the prompts that are likely to give `missing` useful trees."""
        begin = time.time()
        count = min(2 * self.aepo.prompts_per_step, math.ceil(missing / max(float(state.kept_share), 0.25)))
        prompts = [next(self.prompts) for _ in range(math.ceil(count / jax.process_count()))]
        waited = time.time() - begin
        trees = self.sampler.rollouts(self._requests(prompts, iteration, attempt, float(state.tau_high)))
        graded = grade(prompts, trees, self.run.decode, process=jax.process_index())
        return Draw(graded, state, time.time() - begin, waited)

    def drawn(self, draw: "Future[Draw]") -> Draw | None:
        """Returns what was drawn; None, in all processes, if one of them was told to go meanwhile."""
        self._wait_for(draw)
        return None if preemption.agreed() else draw.result()

    def scored(self, draw: Draw) -> list[RolloutTree]:
        """Returns the trees of all processes, scored; of the others' prompts only what is not pixels."""
        trees = draw.trees
        if jax.process_count() > 1:
            parts = gather(list(map(_without_pixels, trees)))
            parts[jax.process_index()] = trees
            trees = interleaved(parts)
        return score(trees, draw.state, self.aepo, max_tokens=self.config.sampler.max_response_tokens)

    def calibrated_threshold(self, prompts: Sequence[Prompt]) -> float:
        """Returns tau from single samples of prompts, so that the first iteration already knows one."""
        s = self.config.sampler
        requests = [
            rollout_request(
                prompt, seed=derive_seed(self.config.seed, "threshold", prompt.problem_id), group_size=1,
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_new_tokens=s.max_response_tokens,
            )
            for prompt in prompts
        ]  # fmt: skip
        return trees_threshold(GatheringSampler(self.sampler).rollouts(requests), self.aepo)

    def _requests(self, prompts: Sequence[Prompt], iteration: int, attempt: int, tau_high: float):
        a, s = self.aepo, self.config.sampler
        numbers = share(range(len(prompts) * jax.process_count()))  # among the prompts of all processes
        return [
            rollout_request(
                prompt, seed=derive_seed(self.config.seed, "aepo", iteration, attempt, number),
                group_size=a.group_size, root_leaves=a.root_leaves,
                max_branches_per_sequence=a.max_branches_per_sequence, tau_high=tau_high,
                branch_at=a.branch_at, branch_choice=a.branch_choice,
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_new_tokens=s.max_response_tokens,
            )
            for number, prompt in zip(numbers, prompts, strict=True)
        ]  # fmt: skip

    def _wait_for(self, draw: "Future[Draw]") -> None:
        with preemption.breaking_off(self.sampler.break_off):
            wait([draw])


def _without_pixels(tree: RolloutTree) -> RolloutTree:
    none = np.zeros((0, tree.problem.patches.shape[1]), np.float32)
    prompt = dataclasses.replace(tree.problem, patches=none)
    return dataclasses.replace(tree, prompt=prompt)
