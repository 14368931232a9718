"""Supervised fine-tuning on packed prompt-response segments; the loss is on the response alone.

KL-guided (`cold_start.kl`, method.md section 4): drift from the starting weights costs, the more so the more a problem's
difficulty weighs. The penalty is the estimator on the *teacher's* tokens: zero exactly where their log-probabilities have
not moved, but no unbiased KL, for which the tokens would have to be the policy's own.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from ares_jax.aepo.kl import per_token_kl
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.models.flops import update_flops
from ares_jax.parallel.chips import utilization
from ares_jax.parallel.distributed import gather, joint_position, local_rows, own_position
from ares_jax.parallel.sharding import batch_sharding
from ares_jax.params import Params
from ares_jax.run.run import Run
from ares_jax.training import Update, make_optimizer, make_schedule, trainable
from ares_jax.training.log_probs import TokenStatistics, token_statistics
from ares_jax.training.run import TrainingRun
from ares_jax.training.update import LossFn
from data_pipeline.packing import Segment, response_segment
from data_pipeline.prompts import Prompt


def example(prompt: Prompt, response: Int[np.ndarray, "N"], kl_weight: float = 0.0) -> Segment:
    """Returns prompt and response as one segment, with `SFT_FIELDS`.

    On the response `weight` is 1 and `kl_weight` is the weight of its drift from the starting weights.
    """
    ones = np.ones(len(response), np.float32)
    return response_segment(prompt, response, {"loss_mask": ones > 0, "weight": ones, "kl_weight": kl_weight * ones})


def fine_tuning_loss(statistics: TokenStatistics, estimator: str) -> LossFn:
    """Returns the loss of a micro-batch whose `weight`s sum to 1 over the update: NLL, and KL where there is a reference.

    The batch then holds `reference_log_prob` [B, T], nats. Metrics: `kl`, the unweighted mean over response tokens.
    """

    def loss(params, batch):
        log_probs, _ = statistics(params, batch)
        counted = batch["loss_mask"]
        nll = -jnp.sum(jnp.where(counted, batch["weight"] * log_probs, 0.0))
        if "reference_log_prob" not in batch:
            return nll, {}
        drift = per_token_kl(log_probs, batch["reference_log_prob"], estimator)
        drift = jnp.where(counted, batch["weight"] * drift, 0.0)
        return nll + jnp.sum(batch["kl_weight"] * drift), {"nll": nll, "kl": jnp.sum(drift)}

    return loss


def fine_tune(
    run: Run,
    stage: str,
    start: Callable[[], Params],
    batches: Any,
    *,
    steps: int,
    learning_rate: float,
    lora: bool,
    guided: bool = False,
) -> int:
    """Trains `steps` updates into the checkpoints of `stage`, going on where an earlier run was cut off.

    Args:
      start: gives the weights to start from (called if there is no checkpoint yet, or they are the reference, too).
      batches: iterator over lists of segments, with `get_state` and `set_state`.
      lora: train LoRA's parameters alone; otherwise the model's own.
      guided: keep the weights of `start` as the reference of the KL term.

    Returns the number of response tokens learned from.
    """
    config, place = run.config, run.placement
    pace = {
        "learning_rate": learning_rate, "steps": steps, "warmup_steps": int(config.cold_start.warmup_fraction * steps),
        "final_fraction": 0.1,
    }  # fmt: skip
    schedule, optimizer = make_schedule(**pace), make_optimizer(config.optimizer, **pace)
    statistics = token_statistics(run.model, jnp.asarray(run.banned))
    trained = trainable(config.optimizer, lora=lora)
    update = Update(fine_tuning_loss(statistics, config.cold_start.kl.estimator), optimizer, place, trained)
    rows = batch_sharding(place.mesh)
    reference_log_probs = jax.jit(lambda params, batch: statistics(params, batch)[0], out_shardings=rows)
    training = TrainingRun(run, stage, optimizer, trained, start, reference="device" if guided else "")
    tokens: int = training.extra.get("tokens", 0)
    if training.extra:
        batches.set_state(own_position(training.extra["iterator"]))
    values = {"skipped": float(training.state.skipped)}
    STARTUP.mark("weights")
    first = training.step
    bar = tqdm(range(first, steps), desc=f"{stage}: fine-tuning", initial=first, total=steps, unit="step")
    with training.guard as guard:
        for step in bar:
            with guard.step(step):
                started = time.time()
                segments = next(batches)
                waited = time.time() - started
                weighted, count = normalized(segments)
                begin = time.time()
                packed = run.pack(weighted)
                fixed: list[dict[str, np.ndarray]] = [{} for _ in packed]
                if training.reference is not None:
                    params = {**training.state.params, **training.reference}
                    with jax.set_mesh(place.mesh):
                        rows_of = [local_rows(reference_log_probs(params, place.put_batch(batch))) for batch in packed]
                    fixed = [{"reference_log_prob": rows} for rows in rows_of]
                batches_now = ({**batch, **more} for batch, more in zip(packed, fixed, strict=True))
                training.state, metrics = update(training.state, batches_now)
                skipped, values = values["skipped"], {name: float(value) for name, value in metrics.items()}
            training.step = step + 1
            if values["skipped"] > skipped:
                tqdm.write(f"{stage}: step {step + 1}: gradient not finite; update left out, {values['skipped']:.0f} so far")
            tokens += count
            seconds = time.time() - begin
            values |= {"tokens_per_second": count / seconds, "padding": packed.padding}
            values["learning_rate"] = float(schedule(step - skipped))
            values |= {"time/data": waited, "time/step": time.time() - started}
            frozen = config.optimizer.freeze_vision
            flops = update_flops(run.model.config, weighted, fixed_passes=int(guided), freeze_vision=frozen)
            values |= utilization(sum(gather(flops)), seconds, place.mesh.devices.flatten().tolist())
            training.metrics.write(step + 1, values | {"goodput": guard.goodput()})
            bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_second']:.0f}")
            stop = guard.must_stop() and step + 1 < steps
            if stop or (step + 1) % config.cold_start.save_every == 0 or step + 1 == steps:
                extra = {"iterator": joint_position(batches.get_state()), "tokens": tokens}
                if stop:
                    raise training.stopped(extra, stage, steps)
                training.save(extra)
    training.end()
    return tokens


def normalized(segments: Sequence[Segment]) -> tuple[list[Segment], int]:
    """Returns the segments with weights that sum to 1 over those of all processes, and their number of response tokens."""
    count = sum(gather(int(sum(s.token_fields["weight"].sum() for s in segments))))
    fields = [{**s.token_fields, "weight": s.token_fields["weight"] / count} for s in segments]
    return [dataclasses.replace(s, token_fields=own) for s, own in zip(segments, fields, strict=True)], count
