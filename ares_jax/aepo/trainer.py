"""The AEPO loop, read from top to bottom: draw trees, score, filter, update, push the weights, move the controllers.

With `aepo.staleness = 1` batch k + 1 is drawn while the learner updates on batch k. Its policy is then one update old,
never more, and the ratio's denominator is still the policy that drew the tokens.

Of several processes each draws and grades its share of the prompts, tells the others (without pixels), and packs its own
trees into its own rows; everything in between they all do alike. Only main threads talk to each other.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ares_jax.aepo import state as aepo_state
from ares_jax.aepo.advantage import ADVANTAGES
from ares_jax.aepo.batch import SCALES, learner_segments
from ares_jax.aepo.difficulty import NAMES, RULES, noted
from ares_jax.aepo.filtering import FILTERS, keep_tree, pass_rate_histogram
from ares_jax.aepo.kl import ESTIMATORS
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.reward import overlong_penalty
from ares_jax.aepo.scoring import grade, score
from ares_jax.aepo.windows import batch_threshold
from ares_jax.errors import Preempted, UserError
from ares_jax.evaluation.harness import evaluate, overall_accuracy
from ares_jax.lifecycle import preemption
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.lifecycle.steps import Steps
from ares_jax.metrics import MetricsWriter, append_jsonl, read_jsonl, write_atomic
from ares_jax.models.flops import update_flops
from ares_jax.parallel.chips import utilization
from ares_jax.parallel.distributed import gather, interleaved, is_first, joint_position, own_position, share, to_host
from ares_jax.params import to_flat
from ares_jax.rewards.hard_split import held_out
from ares_jax.run.workspace import Workspace, colocated, everyone
from ares_jax.sampling.branching import BRANCH_AT, BRANCH_CHOICES, is_causal
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.training import abstract_state, initial_state, make_optimizer, make_schedule, trainable
from data_pipeline.images import to_data_url
from data_pipeline.micro_batch import MicroBatch
from data_pipeline.packing import PATCHES_PER_TOKEN, Segment, padding_share
from data_pipeline.prompts import Prompt
from data_pipeline.reading import HoldingOut


class _Draw(NamedTuple):
    """The trees that this process drew at one time."""

    trees: list[RolloutTree]  # graded
    state: aepo_state.AepoState  # they were drawn in
    seconds: float
    waited: float  # seconds of them, for prompts


class _Batch(NamedTuple):
    """The trees of one iteration, of all processes."""

    drawn: list[RolloutTree]
    kept: list[RolloutTree]  # by the filter, as many as are learned from
    useful: int  # groups that the filter keeps, those that nothing is learned from included
    tokens: int  # of responses, sampled for it
    next_prompt: Any  # state of the prompts' iterator after it
    seconds: float
    waited: float  # seconds of them, for prompts


_CHOICES = {
    "tau_definition": ("trajectory", "window_median"), "difficulty_rule": tuple(RULES),
    "shaping": ("released", "paper", "none"), "tree": tuple(ADVANTAGES), "scale": SCALES, "branch_at": BRANCH_AT,
    "branch_choice": BRANCH_CHOICES, "filter.by": FILTERS,
    "reduction": ("token", "seq"), "old_log_probs": ("sampler", "recomputed"),
    "kl.estimator": ESTIMATORS, "kl.reference": ("device", "host"), "staleness": (0, 1),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises `UserError` where AEPO cannot run as configured: before the first tokens are drawn, not after."""
    a, s, p = config.aepo, config.sampler, config.packing
    values = {**a, **{f"{part}.{name}": value for part in ("kl", "filter") for name, value in a[part].items()}}
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"aepo.{name}={values[name]!r} is not one of {', '.join(map(str, choices))}")
    if a.staleness and s.tensor > 1 and colocated(config):
        # Two threads would start programs of several chips, in any order on each; and sharing chips, neither is faster.
        raise UserError(
            f"aepo.staleness={a.staleness}: a colocated sampler over sampler.tensor={s.tensor} devices can only draw while "
            "the learner does not learn; set aepo.staleness=0"
        )
    if not 1 <= a.root_leaves <= a.group_size:
        raise UserError(f"aepo.root_leaves={a.root_leaves}: a group has {a.group_size} leaves; give 1 to {a.group_size}")
    if a.tree == "split" and a.root_leaves < a.group_size and not is_causal(a.branch_at, a.branch_choice):
        raise UserError(
            f"aepo.tree='split' with aepo.branch_at={a.branch_at!r}, aepo.branch_choice={a.branch_choice!r}: a fork chosen "
            "by what the parent drew next has no fresh sample in its parent, and the gradient would be biased; take "
            "'window_end' and 'first', or aepo.tree='local'"
        )
    if a.tree in ("split", "local") and a.root_leaves < 2:
        raise UserError(
            f"aepo.root_leaves={a.root_leaves}: aepo.tree={a.tree!r} compares a root with the other first roots; give at "
            "least 2, or take aepo.tree='subtree'"
        )
    if (longest := s.max_prompt_tokens + s.max_response_tokens) > p.row_tokens:
        raise UserError(
            f"packing.row_tokens={p.row_tokens}: a prompt and its response may have {longest}; raise it, or lower "
            "sampler.max_response_tokens or max_prompt_tokens"
        )
    if s.max_prompt_patches > p.row_patches or p.row_patches % PATCHES_PER_TOKEN:
        raise UserError(
            f"packing.row_patches={p.row_patches}: a prompt may have {s.max_prompt_patches}; raise it to a multiple of "
            f"{PATCHES_PER_TOKEN}, or lower sampler.max_prompt_patches"
        )


def _seconds(f: Callable[..., object], *arguments: object) -> float:
    """Calls `f` and returns how long it took."""
    begin = time.time()
    f(*arguments)
    return time.time() - begin


class Trainer:
    """Holds what one run of AEPO holds; `run` is the loop."""

    def __init__(self, workspace: Workspace):
        """Opens the run. Raises `UserError` as `check` does, with nothing to begin with, or a damaged checkpoint."""
        self.workspace = workspace
        self.config, self.aepo = workspace.config, workspace.config.aepo
        a = self.aepo
        check(self.config)
        updates = a.steps * a.minibatches
        optimizer = make_optimizer(
            self.config.optimizer, learning_rate=a.learning_rate, steps=updates, warmup_steps=a.warmup_steps
        )
        self.schedule = make_schedule(a.learning_rate, steps=updates, warmup_steps=a.warmup_steps)
        trained = trainable(self.config.optimizer, lora=workspace.model.lora is not None)
        self.learner = Learner(
            workspace.model,
            workspace.banned,
            optimizer,
            a,
            workspace.placement,
            temperature=self.config.sampler.temperature,
            trainable=trained,
        )
        self.folder = workspace.folder / "aepo"
        self.background = ThreadPoolExecutor(1)
        encoder = HoldingOut(workspace.encoder, held_out(workspace.folder / "cold_start"))
        self.prompts = workspace.stream(workspace.problems("train"), encoder, seed=self.config.seed + 1)
        self.checkpoints = workspace.checkpoints("aepo")
        start = workspace.params_for_aepo()
        # What is not trained is never another's. A copy: the update donates its buffers.
        copy = to_host if a.kl.reference == "host" else jnp.copy
        self.reference = {name: copy(value) for name, value in start.items() if trained(name)} if a.kl.weight else None
        self.validation = workspace.prompts("validation")
        self.iteration = self.saved = self.checkpoints.latest() or 0
        self.tokens = 0  # response tokens sampled so far
        self.difficulty: dict[str, int] = {}  # bucket of every problem when it was drawn last
        # Behind the last batch learnt from: one in flight is lost when the run is killed, and drawn again.
        self.prompt_position = self.prompts.get_state()
        if self.iteration:
            template = abstract_state(to_flat(workspace.model), optimizer, workspace.placement, trained)
            params, rest, extra = self.checkpoints.restore(self.iteration, template.params, template._replace(params={}))
            self.train_state = rest._replace(params=params)
            self.state = aepo_state.from_json(extra["aepo"])
            self.prompt_position = own_position(extra["prompts"])
            self.prompts.set_state(self.prompt_position)
            self.tokens, self.difficulty, progress = extra["tokens"], extra["difficulty"], extra["progress"]
        else:
            self.train_state = initial_state(start, optimizer, workspace.placement, trained)
            self.state, progress = aepo_state.initial_state(a), None
        self.steps = Steps(self.folder, watchdog=self.config.watchdog_seconds, state=progress)
        self.writer = MetricsWriter(self.folder, self.iteration if self.iteration else -1)
        rollouts = self.folder / "rollouts.jsonl"
        kept = [line for line in read_jsonl(rollouts) if line["step"] <= self.iteration and self.iteration]
        write_atomic(rollouts, "".join(json.dumps(line) + "\n" for line in kept))

    def run(self, client) -> int:
        """Trains to the end with the samplers behind `client`. Returns the number of response tokens sampled."""
        self.client, a = client, self.aepo
        STARTUP.mark("sampler")
        draw: Future[_Draw] | None = None
        stop = False  # before the end
        waited = 0.0  # seconds that nothing was learned because the next trees were not complete
        saving: dict[str, float] = {}  # of the step before: a step is saved once its metrics are written
        with self.steps as around:
            self.push()
            if self.iteration == 0:
                self.writer.write(0, self.validate())
            if math.isnan(self.state.tau_high):
                self.state = self.state._replace(tau_high=np.array(self.calibrated_threshold()))
            bar = tqdm(total=a.steps, initial=self.iteration, desc="aepo", unit="step")
            STARTUP.mark("first weights pushed, validation")
            while self.iteration < a.steps and not self.out_of_tokens():
                with around.step(self.iteration):
                    begin = time.time()
                    draw = draw or self.begin_draw(self.iteration)
                    now = self.complete(draw, self.iteration)
                    if now is None:
                        around.broken_off()
                        stop = True
                        break
                    draw = None
                    waited += time.time() - begin
                    if a.staleness and self.iteration + 1 < a.steps:
                        # The next trees are drawn with the present weights while these teach the next ones.
                        draw = self.begin_draw(self.iteration + 1)
                    values = self.learn(now) | {
                        "time/sample": now.seconds, "time/data": now.waited, "time/wait": waited,
                        "overlap": max(0.0, 1 - waited / now.seconds),
                        "tokens_per_second/sample": now.tokens / now.seconds,
                    } | saving  # fmt: skip
                    # A tree has one policy: weights change between two batches only.
                    waited = _seconds(self.wait_for, draw) if draw is not None else 0.0
                self.iteration += 1
                last = self.iteration == a.steps or self.out_of_tokens()
                stop = around.must_stop() and not last
                if not stop:
                    values["time/push"] = _seconds(self.push)
                    if self.iteration % a.validate_every == 0 or last:
                        try:
                            values |= self.validate()
                        except Preempted:  # the step is whole without it
                            stop = True
                values["time/step"] = time.time() - begin
                values["tokens_per_second/step"] = now.tokens / values["time/step"]
                self.writer.write(self.iteration, values | {"goodput": around.goodput()})
                if stop:
                    break
                validated, saving = values.get("validation/accuracy"), {}
                if validated is not None or self.iteration % a.save_every == 0:
                    saving["time/save"] = _seconds(self.save, validated)
                bar.update()
                bar.set_postfix(
                    reward=f"{values['reward/mean']:.2f}", accuracy=f"{values['reward/accuracy']:.2f}",
                    tokens=f"{values['length']:.0f}", branches=f"{values['branches']:.0f}",
                    overlap=f"{values['overlap']:.0%}", tok_s=f"{values['tokens_per_second/step']:.0f}",
                )  # fmt: skip
            bar.close()
            if draw is not None:  # a colocated sampler's programs must not meet those that save
                self.client.break_off()
            self.background.shutdown()
            self.writer.close()
            if stop:
                if self.iteration != self.saved:
                    self.save(None)
                self.checkpoints.wait()
                raise Preempted(f"saved AEPO at step {self.iteration} of {a.steps}")
        self.checkpoints.wait()
        self.checkpoints.close()
        return self.tokens

    def out_of_tokens(self) -> bool:
        return 0 < self.aepo.token_budget <= self.tokens

    def push(self) -> None:
        """Gives the sampler the present weights."""
        self.workspace.push(self.client, self.train_state.params, self.iteration)

    def begin_draw(self, iteration: int) -> "Future[_Draw]":
        return self.background.submit(self.draw, iteration, 0, self.aepo.prompts_per_step, self.state)

    def wait_for(self, draw: "Future[_Draw]") -> None:
        """Returns once a draw has ended; it is broken off if a process is told to go."""
        with preemption.breaking_off(self.client.break_off):
            wait([draw])

    def drawn(self, draw: "Future[_Draw]") -> "_Draw | None":
        """Returns what was drawn; None, in all processes, if one of them was told to go meanwhile."""
        self.wait_for(draw)
        return None if preemption.agreed() else draw.result()

    def learn(self, batch: "_Batch") -> dict[str, float]:
        """Updates the policy on a batch, moves thresholds and controllers, and returns the metrics."""
        a = self.aepo
        begin = time.time()
        rng = np.random.default_rng([self.config.seed, self.iteration])
        order = rng.permutation(len(batch.kept))
        sums: dict[str, np.ndarray] = {}
        losses, norms, padding, skipped = [], [], [], int(self.train_state.skipped)
        flops, fixed = 0.0, (self.reference is not None) + (a.old_log_probs == "recomputed")
        parts = [[batch.kept[i] for i in part] for part in np.array_split(order, min(a.minibatches, len(batch.kept)))]
        old = self.recomputed(parts)
        for part, before in zip(parts, old, strict=True):
            segments, batches = self.packed(part)
            frozen = self.config.optimizer.freeze_vision
            flops += update_flops(self.workspace.model.config, segments, fixed_passes=fixed, freeze_vision=frozen)
            padding.append(padding_share(batches))
            self.train_state, metrics = self.learner.update(self.train_state, batches, self.reference, before)
            losses.append(metrics.pop("loss"))
            norms.append(metrics.pop("grad_norm"))
            if int(metrics["skipped"]) > skipped:
                skipped = int(metrics["skipped"])
                tqdm.write(f"aepo: step {self.iteration + 1}: gradient not finite; update left out, {skipped} so far")
            metrics.pop("skipped")
            sums = metrics if not sums else {name: sums[name] + metrics[name] for name in sums}
        seconds = time.time() - begin
        self.tokens += batch.tokens
        self.prompt_position = batch.next_prompt
        if (self.iteration + 1) % a.log_rollouts_every == 0 or self.iteration == 0:
            self.log_rollouts([s for s in batch.kept if s.process == 0])
        values = self.statistics(batch.drawn, batch.kept, sums)
        measured = {f"{t.problem.source}/{t.problem_id}": t.difficulty for t in batch.drawn}
        self.difficulty, moves = noted(self.difficulty, measured)
        values |= moves | {"groups/useful": float(batch.useful), "tokens_per_second/learn": float(sums["tokens"]) / seconds}
        self.advance(batch.drawn, batch.useful / len(batch.drawn), sums)
        values |= utilization(sum(gather(flops)), seconds, self.workspace.placement.mesh.devices.flatten().tolist())
        return values | {
            "loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), "padding": float(np.mean(padding)),
            "skipped": float(self.train_state.skipped), "tokens/total": float(self.tokens), "time/learn": seconds,
            "learning_rate": self.learning_rate(),
            "data/overlong": float(self.prompts.ledger.overlong), "data/corrupt": float(self.prompts.ledger.corrupt),
            "data/held_out": float(self.prompts.ledger.held_out),
        }  # fmt: skip

    def learning_rate(self) -> float:
        """Returns that of the last update that was not left out; of the first, before there is any."""
        made = int(self.train_state.step) - int(self.train_state.skipped)
        return float(self.schedule(max(made - 1, 0)))

    def packed(self, part: list[RolloutTree]) -> tuple[list[Segment], list[MicroBatch]]:
        """Returns this process's trees of a minibatch, and its rows of the micro-batches that hold them."""
        segments = learner_segments(part, self.state, self.aepo, process=jax.process_index())
        return segments, self.workspace.pack(segments)

    def recomputed(self, parts: list[list[RolloutTree]]) -> list[list[np.ndarray] | None]:
        """Returns the present policy's log-probs of each minibatch, if they are wanted: the ratio of all updates is to it.

        None for the first: its update is of the present policy. The others are packed twice, as all in one take memory.
        """
        if self.aepo.old_log_probs != "recomputed":
            return [None] * len(parts)
        return [None, *(self.learner.log_probs(self.train_state.params, self.packed(part)[1]) for part in parts[1:])]

    def draw(self, iteration: int, attempt: int, missing: int, state: aepo_state.AepoState) -> "_Draw":
        """Draws and grades this process's share of the prompts that are likely to give `missing` useful groups."""
        begin = time.time()
        count = min(2 * self.aepo.prompts_per_step, math.ceil(missing / max(float(state.kept_share), 0.25)))
        prompts = [next(self.prompts) for _ in range(math.ceil(count / jax.process_count()))]
        waited = time.time() - begin
        trees = self.rollouts(prompts, iteration, attempt, float(state.tau_high))
        graded = grade(prompts, trees, self.workspace.decode, process=jax.process_index())
        return _Draw(graded, state, time.time() - begin, waited)

    def complete(self, begun: "Future[_Draw]", iteration: int) -> "_Batch | None":
        """Scores and filters what all processes drew, and draws again until `prompts_per_step` groups survive.

        None, in all processes, if one of them was told to go meanwhile.
        """
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
                return _Batch(drawn, kept, useful, tokens, self.prompts.get_state(), seconds, waited)
            if (attempt := attempt + 1) == a.filter.attempts:
                raise UserError(
                    f"only {len(kept)} of {len(drawn)} groups had a mean {a.filter.by} within "
                    f"[{a.filter.low}, {a.filter.high}] after {attempt} attempts, {a.prompts_per_step} are needed; right "
                    f"leaves a group: {pass_rate_histogram([s.accuracy for s in drawn], a.group_size)}. Choose problems "
                    "nearer to the model's ability, or widen aepo.filter"
                )
            begun = self.background.submit(self.draw, iteration, attempt, a.prompts_per_step - len(kept), draw.state)
        return None

    def scored(self, draw: "_Draw") -> list[RolloutTree]:
        """Returns the groups of all processes, scored; of the others' prompts only what is not pixels."""
        trees = draw.trees
        if jax.process_count() > 1:
            parts = gather(list(map(_without_pixels, trees)))
            parts[jax.process_index()] = trees
            trees = interleaved(parts)
        return score(trees, draw.state, self.aepo, max_tokens=self.config.sampler.max_response_tokens)

    def rollouts(self, prompts: list[Prompt], iteration: int, attempt: int, tau_high: float) -> list[RolloutTree]:
        a, s = self.aepo, self.config.sampler
        numbers = share(range(len(prompts) * jax.process_count()))  # among the prompts of all processes
        requests = [
            rollout_request(
                prompt, seed=derive_seed(self.config.seed, "aepo", iteration, attempt, number),
                group_size=a.group_size, root_leaves=a.root_leaves,
                max_branches_per_sequence=a.max_branches_per_sequence, tau_high=tau_high,
                branch_at=a.branch_at, branch_choice=a.branch_choice,
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_new_tokens=s.max_response_tokens,
            )
            for number, prompt in zip(numbers, prompts, strict=True)
        ]  # fmt: skip
        return self.client.rollouts(requests)

    def calibrated_threshold(self) -> float:
        """Returns tau from single samples of validation prompts, so that the first iteration already knows one."""
        s = self.config.sampler
        requests = [
            rollout_request(
                prompt, seed=derive_seed(self.config.seed, "threshold", prompt.problem_id), group_size=1,
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_new_tokens=s.max_response_tokens,
            )
            for prompt in self.validation
        ]  # fmt: skip
        return self.batch_tau([leaf for group in everyone(self.client).rollouts(requests) for leaf in group.leaves])

    def batch_tau(self, leaves) -> float:
        a = self.aepo
        return batch_threshold(
            [leaf.entropies for leaf in leaves], definition=a.tau_definition, quantile=a.tau_quantile, window=a.window
        )

    def advance(self, drawn: list[RolloutTree], kept_share: float, sums: dict[str, np.ndarray]) -> None:
        """Moves thresholds, targets and controllers on by one iteration.

        Thresholds and targets are measured on roots: a branch begins where entropy is high, and repeats its parent's tokens.
        """
        windows = np.concatenate([tree.windows[tree.is_root] for tree in drawn]).astype(float)
        buckets = np.concatenate([np.full(int(tree.is_root.sum()), tree.difficulty) for tree in drawn])
        roots = [leaf for tree in drawn for leaf in tree.leaves if leaf.parent < 0]
        with np.errstate(invalid="ignore"):
            control = sums["control_kl"] / sums["control_tokens"] if "control_kl" in sums else np.full(3, math.nan)
        self.state = aepo_state.updated_state(
            self.state, self.aepo, batch_tau=self.batch_tau(roots),
            window_means=aepo_state.bucket_means(windows, buckets)[0], control_kl=control, kept_share=kept_share,
        )  # fmt: skip

    def statistics(self, drawn, kept, sums) -> dict[str, float]:
        """Returns what a user of reinforcement learning wants to see of one iteration."""
        leaves = [(s, i, leaf) for s in drawn for i, leaf in enumerate(s.leaves)]
        lengths = np.array([len(leaf.token_ids) for _, _, leaf in leaves], float)
        windows = np.array([s.windows[i] for s, i, _ in leaves], float)
        correct = np.array([s.graded[i] for s, i, _ in leaves], float)
        rewards = np.array([s.overall[i] for s, i, _ in leaves], float)
        buckets = np.array([s.difficulty for s, _, _ in leaves])
        overlong = self.aepo.overlong_penalty * overlong_penalty(
            lengths, self.config.sampler.max_response_tokens, self.aepo.overlong_buffer
        )
        shaping = rewards - correct - overlong
        whole = [max(0, len(leaf.window_means) - self.aepo.window + 1) for _, _, leaf in leaves]  # windows of each
        means = np.concatenate([leaf.window_means[:n] for n, (_, _, leaf) in zip(whole, leaves, strict=True)])
        tokens = max(float(sums["tokens"]), 1.0)
        # Updates made since a token was drawn, over the tokens of which each was drawn once.
        staleness = self.iteration - np.concatenate([tree.policy_version for tree in drawn])
        values = {
            "staleness/mean": staleness.mean(), "staleness/max": staleness.max(),
            "reward/mean": rewards.mean(), "reward/accuracy": correct.mean(),
            "reward/shaping": shaping.mean(), "reward/overlong": overlong.mean(), "length": lengths.mean(),
            "entropy/mean": float(sums["entropy"]) / tokens,
            "entropy/window": means.mean() if means.size else math.nan,
            "tau_high": float(self.state.tau_high), "branches": sum(leaf.parent >= 0 for _, _, leaf in leaves),
            "leaves": len(leaves), "groups/drawn": len(drawn), "groups/kept": len(kept),
            "tokens/shared": sum(s.shared_tokens for s in drawn),
            "tokens/computed": sum(s.computed_tokens for s in drawn),
            "tokens/response": lengths.sum(), "mismatch": float(sums["mismatch"]) / tokens,
            "format": sum(s.formatted for s in drawn) / len(leaves),
            "truncated": np.mean([leaf.finish_reason == "length" for _, _, leaf in leaves]),
            **{f"clip_fraction/{name}": float(sums[f"clip_{name}"]) / tokens for name in ("low", "high", "dual")},
        }  # fmt: skip
        for d, name in enumerate(NAMES):
            inside = buckets == d
            values[f"groups/{name}"] = sum(s.difficulty == d for s in drawn)
            values[f"kl_weight/{name}"] = float(self.state.kappa[d])
            values[f"alpha/{name}"] = float(self.state.alpha[d])
            if not math.isnan(self.state.target[d]):
                values[f"windows_target/{name}"] = float(self.state.target[d])
            if inside.any():
                values[f"reward/{name}"] = rewards[inside].mean()
                values[f"shaping/{name}"] = shaping[inside].mean()
                values[f"accuracy/{name}"] = correct[inside].mean()
                values[f"length/{name}"] = lengths[inside].mean()
                values[f"windows/{name}"] = windows[inside].mean()
            if "kl" in sums and sums["kl_tokens"][d]:
                values[f"kl/{name}"] = float(sums["kl"][d] / sums["kl_tokens"][d])
        return {name: float(value) for name, value in values.items()}

    def validate(self) -> dict[str, float]:
        """Returns accuracy and length per level on the validation split."""
        e, begin = self.config.evaluation, time.time()
        result = evaluate(
            everyone(self.client), self.validation, self.workspace.decode, name="aepo", split="validation",
            seed=self.config.seed, max_new_tokens=self.config.sampler.max_response_tokens, temperature=e.temperature,
            top_p=e.top_p, samples_shown=0,
        )  # fmt: skip
        values = {"validation/accuracy": overall_accuracy(result), "time/validate": time.time() - begin}
        for name, level in result["levels"].items():
            values[f"validation/accuracy/{name}"] = level["accuracy"]
            values[f"validation/length/{name}"] = level["mean_tokens"]
        return values

    def save(self, score: float | None) -> None:
        self.saved = self.iteration
        extra = {
            "aepo": aepo_state.to_json(self.state), "prompts": joint_position(self.prompt_position), "tokens": self.tokens,
            "difficulty": self.difficulty, "progress": self.steps.state(),
        }  # fmt: skip
        self.checkpoints.save(
            self.iteration, self.train_state.params, self.train_state._replace(params={}), extra, score=score
        )

    def log_rollouts(self, kept: list[RolloutTree]) -> None:
        """Appends the trees with the most branches to rollouts.jsonl: what the report draws."""
        shown = sorted(kept, key=lambda tree: (-tree.branches, tree.problem_id))[:4]
        if is_first():
            append_jsonl(self.folder / "rollouts.jsonl", map(self.record, shown))

    def record(self, s: RolloutTree) -> dict:
        tokenizer = self.workspace.tokenizer
        leaves = [
            {
                "tokens": [tokenizer.decode([i]) for i in leaf.token_ids.tolist()],
                "entropies": np.round(leaf.entropies, 4).tolist(),
                "window_means": np.round(leaf.window_means, 4).tolist(),
                "window_mask": leaf.window_mask.tolist(), "parent": leaf.parent,
                "branch_position": leaf.branch_position, "reward": float(reward), "correct": bool(correct),
            }
            for leaf, reward, correct in zip(s.leaves, s.overall, s.graded, strict=True)
        ]  # fmt: skip
        return {
            "step": self.iteration + 1, "problem_id": s.problem_id, "level": s.problem.level,
            "question": s.problem.question, "answer": s.problem.answer,
            "image": to_data_url(s.problem.images[0]) if s.problem.images else None,
            "tau_high": float(self.state.tau_high), "leaves": leaves,
        }  # fmt: skip


def _without_pixels(tree: RolloutTree) -> RolloutTree:
    prompt = dataclasses.replace(tree.problem, images=(), patches=tree.problem.patches[:0])
    return dataclasses.replace(tree, prompt=prompt)
