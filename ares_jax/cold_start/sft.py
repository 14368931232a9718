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
from ares_jax.errors import Preempted
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.lifecycle.steps import Steps
from ares_jax.metrics import MetricsWriter
from ares_jax.models.flops import update_flops
from ares_jax.parallel.chips import utilization
from ares_jax.parallel.distributed import gather, joint_position, local_rows, own_position
from ares_jax.parallel.sharding import batch_sharding
from ares_jax.params import Params, to_flat
from ares_jax.run.workspace import Workspace
from ares_jax.training import Update, abstract_state, initial_state, make_optimizer, make_schedule, trainable
from ares_jax.training.log_probs import TokenStatistics, token_statistics
from ares_jax.training.update import LossFn
from data_pipeline.packing import Segment, padding_share, response_segment
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
    workspace: Workspace,
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
    config = workspace.config
    warmup_steps, final_fraction = int(config.cold_start.warmup_fraction * steps), 0.1
    schedule = make_schedule(learning_rate, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)
    optimizer = make_optimizer(
        config.optimizer, learning_rate=learning_rate, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction
    )
    statistics = token_statistics(workspace.model, jnp.asarray(workspace.banned))
    trained, place = trainable(config.optimizer, lora=lora), workspace.placement
    update = Update(fine_tuning_loss(statistics, config.cold_start.kl.estimator), optimizer, place, trained)
    rows = batch_sharding(place.mesh)
    reference_log_probs = jax.jit(lambda params, batch: statistics(params, batch)[0], out_shardings=rows)
    checkpoints = workspace.checkpoints(stage)
    done = checkpoints.latest()
    first_params = start() if guided or done is None else {}
    # What is not trained is never another's. A copy: the update donates its buffers.
    reference = {name: jnp.copy(value) for name, value in first_params.items() if trained(name)} if guided else None
    if done is None:
        state, tokens, progress = initial_state(first_params, optimizer, place, trained), 0, None
    else:
        template = abstract_state(to_flat(workspace.model), optimizer, place, trained)
        params, rest, extra = checkpoints.restore(done, template.params, template._replace(params={}))
        state = rest._replace(params=params)
        batches.set_state(own_position(extra["iterator"]))
        tokens, progress = extra["tokens"], extra["progress"]
    del first_params
    first, values = int(state.step), {"skipped": float(state.skipped)}
    STARTUP.mark("weights")
    folder = workspace.folder / stage
    writer = MetricsWriter(folder, first)
    bar = tqdm(range(first, steps), desc=f"{stage}: fine-tuning", initial=first, total=steps, unit="step")
    with Steps(folder, watchdog=config.watchdog_seconds, state=progress) as around:
        for step in bar:
            with around.step(step):
                started = time.time()
                segments = next(batches)
                waited = time.time() - started
                weighted, count = normalized(segments)
                begin = time.time()
                packed = workspace.pack(weighted)
                if reference is not None:
                    for batch in packed:
                        with jax.set_mesh(place.mesh):
                            log_probs = reference_log_probs({**state.params, **reference}, place.put_batch(batch))
                        batch["reference_log_prob"] = local_rows(log_probs)
                state, metrics = update(state, packed)
                skipped, values = values["skipped"], {name: float(value) for name, value in metrics.items()}
            if values["skipped"] > skipped:
                tqdm.write(f"{stage}: step {step + 1}: gradient not finite; update left out, {values['skipped']:.0f} so far")
            tokens += count
            seconds = time.time() - begin
            values |= {"tokens_per_second": count / seconds, "padding": padding_share(packed)}
            values["learning_rate"] = float(schedule(step - skipped))
            values |= {"time/data": waited, "time/step": time.time() - started}
            frozen = config.optimizer.freeze_vision
            flops = update_flops(workspace.model.config, weighted, fixed_passes=int(guided), freeze_vision=frozen)
            values |= utilization(sum(gather(flops)), seconds, place.mesh.devices.flatten().tolist())
            writer.write(step + 1, values | {"goodput": around.goodput()})
            bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_second']:.0f}")
            stop = around.must_stop() and step + 1 < steps
            if stop or (step + 1) % config.cold_start.save_every == 0 or step + 1 == steps:
                extra = {
                    "iterator": joint_position(batches.get_state()), "tokens": tokens, "progress": around.state()
                }  # fmt: skip
                checkpoints.save(step + 1, state.params, state._replace(params={}), extra)
            if stop:
                checkpoints.wait()
                raise Preempted(f"saved {stage} at step {step + 1} of {steps}")
    checkpoints.wait()
    checkpoints.close()
    writer.close()
    return tokens


def normalized(segments: Sequence[Segment]) -> tuple[list[Segment], int]:
    """Returns the segments with weights that sum to 1 over those of all processes, and their number of response tokens."""
    count = sum(gather(int(sum(s.token_fields["weight"].sum() for s in segments))))
    fields = [{**s.token_fields, "weight": s.token_fields["weight"] / count} for s in segments]
    return [dataclasses.replace(s, token_fields=own) for s, own in zip(segments, fields, strict=True)], count
