"""The AEPO loop, read from top to bottom: draw trees, score, filter, update, move the controllers, push the weights.

With `aepo.staleness = 1` batch k + 1 is drawn while the learner updates on batch k. Its policy is then one update old,
never more, and the ratio's denominator is still the policy that drew the tokens. Every process of a run does the same.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from tqdm import tqdm

from ares_jax.aepo import state as aepo_state
from ares_jax.aepo.checks import check
from ares_jax.aepo.difficulty import update_difficulty
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.metrics import iteration_metrics
from ares_jax.aepo.producer import Batch, RolloutProducer
from ares_jax.aepo.rollout_log import begin_log, log_trees
from ares_jax.aepo.updates import update_policy
from ares_jax.errors import Preempted
from ares_jax.evaluation.harness import validation_metrics
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.parallel.chips import utilization
from ares_jax.parallel.distributed import gather, joint_position, own_position
from ares_jax.rewards.hard_split import held_out
from ares_jax.run.run import Run
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.sampler import Sampler
from ares_jax.training import make_optimizer, make_schedule, trainable
from ares_jax.training.run import TrainingRun
from data_pipeline.reading import HoldingOut


class Trainer:
    """Holds what one run of AEPO holds; `train` is the loop."""

    def __init__(self, run: Run):
        """Opens the run. Raises `UserError` as `check` does, with nothing to begin with, or a damaged checkpoint."""
        config, a = run.config, run.config.aepo
        check(config)
        self.run, self.config, self.aepo = run, config, a
        pace = {"learning_rate": a.learning_rate, "steps": a.steps * a.minibatches, "warmup_steps": a.warmup_steps}
        self.schedule, optimizer = make_schedule(**pace), make_optimizer(config.optimizer, **pace)
        trained = trainable(config.optimizer, lora=run.model.lora is not None)
        self.learner = Learner(
            run.model, run.banned, optimizer, a, run.placement,
            temperature=config.sampler.temperature, trainable=trained,
        )  # fmt: skip
        encoder = HoldingOut(run.encoder, held_out(run.folder / "cold_start"))
        self.prompts = run.stream(run.problems("train"), encoder, seed=config.seed + 1)
        self.validation = run.prompts("validation")
        self.training = TrainingRun(
            run, "aepo", optimizer, trained, run.params_for_aepo, reference=a.kl.reference if a.kl.weight else ""
        )
        extra = self.training.extra
        self.state = aepo_state.from_json(extra["aepo"]) if extra else aepo_state.initial_state(a)
        self.tokens: int = extra.get("tokens", 0)  # of responses, sampled so far
        self.difficulty: dict[str, int] = dict(extra.get("difficulty", {}))  # of every problem, when it was drawn last
        if extra:
            self.prompts.set_state(own_position(extra["prompts"]))
        # Behind the last batch learned from: one in flight is lost when the run is killed, and drawn again.
        self.prompt_position = self.prompts.get_state()
        self.rollout_log = self.training.folder / "rollouts.jsonl"
        begin_log(self.rollout_log, self.training.step)

    def train(self, sampler: Sampler) -> int:
        """Trains to the end with rollouts from `sampler`. Returns the number of response tokens sampled."""
        a, training = self.aepo, self.training
        self.sampler, rollouts = sampler, RolloutProducer(self.run, self.prompts, sampler)
        STARTUP.mark("sampler")
        stop = False  # before the end
        waited = 0.0  # seconds that nothing was learned because the next trees were not complete
        saving: dict[str, float] = {}  # of the step before: a step is saved once its metrics are written
        with training.guard as guard:
            self.push()
            if training.step == 0:
                training.metrics.write(0, self.validate())
            if math.isnan(self.state.tau_high):
                self.state = self.state._replace(tau_high=np.array(rollouts.calibrated_threshold(self.validation)))
            bar = tqdm(total=a.steps, initial=training.step, desc="aepo", unit="step")
            STARTUP.mark("first weights pushed, validation")
            while not self.done():
                with guard.step(training.step):
                    begin = time.time()
                    batch = rollouts.next(training.step, self.state)
                    if batch is None:
                        guard.broken_off()
                        stop = True
                        break
                    waited += time.time() - begin
                    if a.staleness and training.step + 1 < a.steps:
                        # The next trees are drawn with the present weights while these teach the next ones.
                        rollouts.begin(training.step + 1, self.state)
                    values = self.learn(batch) | {
                        "time/sample": batch.seconds, "time/data": batch.waited, "time/wait": waited,
                        "overlap": max(0.0, 1 - waited / batch.seconds),
                        "tokens_per_second/sample": batch.tokens / batch.seconds,
                    } | saving  # fmt: skip
                    waited = _seconds(rollouts.wait)  # a tree has one policy: weights change between two batches only
                training.step += 1
                stop = guard.must_stop() and not self.done()
                if not stop:
                    values["time/push"] = _seconds(self.push)
                    if training.step % a.validate_every == 0 or self.done():
                        try:
                            values |= self.validate()
                        except Preempted:  # the step is whole without it
                            stop = True
                values["time/step"] = time.time() - begin
                values["tokens_per_second/step"] = batch.tokens / values["time/step"]
                training.metrics.write(training.step, values | {"goodput": guard.goodput()})
                if stop:
                    break
                score, saving = values.get("validation/accuracy"), {}
                if score is not None or training.step % a.save_every == 0:
                    saving["time/save"] = _seconds(partial(training.save, self.extra(), score=score))
                bar.update()
                bar.set_postfix(
                    reward=f"{values['reward/mean']:.2f}", accuracy=f"{values['reward/accuracy']:.2f}",
                    tokens=f"{values['length']:.0f}", branches=f"{values['branches']:.0f}",
                    overlap=f"{values['overlap']:.0%}", tok_s=f"{values['tokens_per_second/step']:.0f}",
                )  # fmt: skip
            bar.close()
            rollouts.close()
            if stop:
                raise training.stopped(self.extra(), "AEPO", a.steps)
        training.end()
        return self.tokens

    def done(self) -> bool:
        """Says whether all steps are made, or all tokens are spent."""
        return self.training.step >= self.aepo.steps or 0 < self.aepo.token_budget <= self.tokens

    def push(self) -> None:
        """Gives the sampler the present weights."""
        self.run.push(self.sampler, self.training.state.params, self.training.step)

    def learn(self, batch: Batch) -> dict[str, float]:
        """Updates the policy on a batch, moves thresholds and controllers, and returns the metrics."""
        a, training, begin = self.aepo, self.training, time.time()
        updated = update_policy(self.learner, self.run, training, batch.kept, self.state)
        sums, seconds = updated.sums, time.time() - begin
        self.tokens += batch.tokens
        self.prompt_position = batch.next_prompt
        if (training.step + 1) % a.log_rollouts_every == 0 or training.step == 0:
            own = [tree for tree in batch.kept if tree.process == 0]
            tau = float(self.state.tau_high)
            log_trees(self.rollout_log, own, self.run.tokenizer, step=training.step + 1, tau_high=tau)
        values = iteration_metrics(
            batch.drawn, len(batch.kept), sums, iteration=training.step, state=self.state, aepo=a,
            max_tokens=self.config.sampler.max_response_tokens,
        )  # fmt: skip
        measured = {f"{tree.problem.source}/{tree.problem_id}": tree.difficulty for tree in batch.drawn}
        self.difficulty, moves = update_difficulty(self.difficulty, measured)
        self.state = aepo_state.after_iteration(self.state, a, batch.drawn, sums, batch.useful / len(batch.drawn))
        devices, ledger = self.run.placement.mesh.devices.flatten().tolist(), self.prompts.ledger
        made = int(training.state.step) - int(training.state.skipped)  # updates that were not left out
        return values | moves | utilization(sum(gather(updated.flops)), seconds, devices) | {
            "loss": updated.loss, "grad_norm": updated.grad_norm, "padding": updated.padding, "time/learn": seconds,
            "groups/useful": float(batch.useful), "tokens_per_second/learn": float(sums["tokens"]) / seconds,
            "skipped": float(training.state.skipped), "tokens/total": float(self.tokens),
            "learning_rate": float(self.schedule(max(made - 1, 0))), "data/overlong": float(ledger.overlong),
            "data/corrupt": float(ledger.corrupt), "data/held_out": float(ledger.held_out),
        }  # fmt: skip

    def validate(self) -> dict[str, float]:
        """Returns accuracy and length per level on the validation split."""
        sampler = GatheringSampler(self.sampler)
        return validation_metrics(sampler, self.validation, self.run.decode, self.config)

    def extra(self) -> dict:
        """Returns what a checkpoint holds besides weights and moments."""
        return {
            "aepo": aepo_state.to_json(self.state), "prompts": joint_position(self.prompt_position), "tokens": self.tokens,
            "difficulty": self.difficulty,
        }  # fmt: skip


def _seconds(f: Callable[[], object]) -> float:
    """Calls `f` and returns how long it took."""
    begin = time.time()
    f()
    return time.time() - begin
