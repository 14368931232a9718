"""The jitted AEPO loss step: clipped surrogate and token-wise KL over packed rollouts."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Shaped
from ml_collections import ConfigDict

from ares_jax.aepo.kl import per_token_kl
from ares_jax.aepo.loss import importance_weights, surrogate_terms
from ares_jax.models.qwen2_5_vl import Qwen25VL
from ares_jax.parallel.distributed import local_rows
from ares_jax.parallel.sharding import Placement, batch_sharding
from ares_jax.params import Params
from ares_jax.training.log_probs import token_statistics
from ares_jax.training.update import Batch, Lower, Trainable, TrainState, Update, everything, in_mesh


class Learner:
    """One policy update from packed micro-batches whose `weight`s sum to 1."""

    def __init__(
        self, model: Qwen25VL, banned: Bool[np.ndarray, "V"], optimizer: optax.GradientTransformation, aepo: ConfigDict,
        placement: Placement, *, temperature: float, trainable: Trainable = everything,
    ):  # fmt: skip
        statistics = token_statistics(model, jnp.asarray(banned), temperature=temperature)
        self._recompute = aepo.old_log_probs == "recomputed"
        if aepo.old_log_probs not in ("sampler", "recomputed"):
            raise ValueError(f"aepo.old_log_probs={aepo.old_log_probs!r} is not one of sampler, recomputed")
        clip = {name: aepo[name] for name in ("clip_low", "clip_high", "clip_dual")}
        estimator, cap, recompute = aepo.kl.estimator, aepo.importance_cap, self._recompute

        def loss(params: Params, batch: Batch):
            counted = batch["loss_mask"]
            log_probs, entropies = statistics(params, batch)
            sampled = batch["old_log_prob"]
            old = batch["recomputed_log_prob"] if recompute else sampled
            terms, clipped = surrogate_terms(log_probs, old, batch["advantage"], **clip)
            if recompute:
                terms = terms * importance_weights(old, sampled, cap)
            sums = {f"clip_{name}": jnp.sum(flag & counted) for name, flag in clipped.items()}
            if "reference_log_prob" in batch:
                kl = jnp.where(counted, per_token_kl(log_probs, batch["reference_log_prob"], estimator), 0.0)
                terms = terms + batch["kl_weight"] * kl
                here = counted & (batch["difficulty"] == jnp.arange(3)[:, None, None])
                outside = here & ~batch["in_window"]
                sums |= {
                    "kl": jnp.sum(here * kl, axis=(1, 2)), "kl_tokens": jnp.sum(here, axis=(1, 2)),
                    "control_kl": jnp.sum(outside * kl, axis=(1, 2)), "control_tokens": jnp.sum(outside, axis=(1, 2)),
                }  # fmt: skip
            sums["tokens"] = jnp.sum(counted)
            sums["entropy"] = jnp.sum(jnp.where(counted, entropies, 0.0))
            sums["mismatch"] = jnp.sum(jnp.where(counted, jnp.abs((old if recompute else log_probs) - sampled), 0.0))
            # A select, not a product: at tokens that do not count, terms may be infinite.
            return jnp.sum(jnp.where(counted, batch["weight"] * terms, 0.0)), sums

        self._update = Update(loss, optimizer, placement, trainable)
        self._placement = placement

        def log_probs(params, batch):
            return statistics(params, batch)[0]

        self._log_probs = jax.jit(log_probs, out_shardings=batch_sharding(placement.mesh))

    def lower(self, state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Lower]:
        """Returns what lowers the programs of an update as `Update.lower` does, and `log_probs`, over fixed weights."""
        later = ("reference_log_prob", "recomputed_log_prob")
        fixed = {name: value for name, value in batch.items() if name not in later}
        log_probs = in_mesh(self._placement, lambda: self._log_probs.lower(state.params, fixed))
        return {"log_probs": log_probs, **self._update.lower(state, batch)}

    def log_probs(
        self, params: Params, batches: Sequence[Mapping[str, Shaped[np.ndarray, "B ..."]]]
    ) -> list[Float[np.ndarray, "B T"]]:
        """Returns the log-probs, nats, that weights on the device give the tokens of each micro-batch."""
        with jax.set_mesh(self._placement.mesh):
            return [local_rows(self._log_probs(params, self._placement.put_batch(batch))) for batch in batches]

    def update(
        self,
        state: TrainState,
        batches: Sequence[Mapping[str, Shaped[np.ndarray, "B ..."]]],
        reference: Mapping[str, Shaped[np.ndarray, "..."]] | Params | None,
        old: Sequence[Float[np.ndarray, "B T"]] | None = None,
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Returns the new state, and `loss`, `grad_norm`, `skipped` and sums over tokens that the trainer averages.

        Args:
          reference: weights in which the reference policy differs from the present one, on the device or on the host (they
            are then on the device only while its log-probs are computed); None: no KL term.
          old: where they are recomputed, the log-probs of the policy that the ratio is to; None: of the present one.
        """
        fixed: dict[str, Sequence[np.ndarray]] = {}  # on the host: the devices hold one micro-batch at a time
        if self._recompute:
            fixed["recomputed_log_prob"] = self.log_probs(state.params, batches) if old is None else old
        if reference is not None:
            fixed["reference_log_prob"] = self.log_probs(self._placement.put({**state.params, **reference}), batches)
        micro_batches = (
            {**batch, **{name: values[number] for name, values in fixed.items()}} for number, batch in enumerate(batches)
        )
        state, metrics = self._update(state, micro_batches)
        return state, jax.device_get(metrics)
