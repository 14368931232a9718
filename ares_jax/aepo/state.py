"""What AEPO carries from one iteration to the next, besides the weights: thresholds, targets, controllers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from ares_jax.aepo.kl import updated_controller
from ares_jax.aepo.reward import updated_alpha
from ares_jax.aepo.windows import smoothed, trees_threshold
from ares_jax.sampling.rollout_tree import RolloutTree


class AepoState(NamedTuple):
    """A pytree. Triples are per difficulty bucket: easy, medium, hard. NaN: nothing measured yet."""

    tau_high: Float[np.ndarray, ""]  # nats; a window at or above it explores
    target: Float[np.ndarray, "3"]  # windows a leaf should have: the moving average over earlier batches
    alpha: Float[np.ndarray, "3"]  # scale of the released reward
    kappa: Float[np.ndarray, "3"]  # weight of the KL term
    kept_share: Float[np.ndarray, ""]  # share of drawn groups that filtering keeps: says how many to draw


def initial_state(aepo: ConfigDict) -> AepoState:
    """Returns the state before the first iteration; `aepo` is that section of the config."""
    return AepoState(
        np.array(math.nan),
        np.full(3, math.nan),
        np.full(3, float(aepo.shaping_weight)),
        np.full(3, float(aepo.kl.weight)),
        np.array(0.5),
    )


def bucket_means(
    values: Float[np.ndarray, "N"], buckets: Int[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Returns mean and variance per bucket; NaN where a bucket is empty."""
    means, variances = np.full((2, 3), math.nan)
    for d in range(3):
        if (inside := values[buckets == d]).size:
            means[d], variances[d] = inside.mean(), inside.var()
    return means, variances


def updated_state(
    state: AepoState,
    aepo: ConfigDict,
    *,
    batch_tau: float,
    window_means: Float[np.ndarray, "3"],
    control_kl: Float[np.ndarray, "3"],
    kept_share: float,
) -> AepoState:
    """Returns the state after an iteration.

    Args:
      batch_tau: threshold of this batch alone.
      window_means: mean number of validated windows of a leaf, per bucket.
      control_kl: mean KL of non-window tokens, per bucket, nats a token.
      kept_share: of the groups drawn in this iteration.
    """
    kappa = state.kappa
    if aepo.kl.dynamic and aepo.kl.weight > 0:
        moved = updated_controller(
            state.kappa, control_kl, np.array(aepo.kl.target), rate=aepo.kl.rate, minimum=aepo.kl.minimum,
            maximum=aepo.kl.maximum,
        )  # fmt: skip
        kappa = np.asarray(moved, np.float64)
    pairs = zip(state.target, window_means, strict=True)
    target = [smoothed(float(old), float(new), aepo.target_decay) for old, new in pairs]
    return AepoState(
        np.array(smoothed(float(state.tau_high), batch_tau, aepo.tau_decay)),
        np.array(target),
        np.asarray(updated_alpha(state.alpha, window_means, state.target), np.float64),
        kappa,
        np.array(smoothed(float(state.kept_share), kept_share, 0.8)),
    )


def after_iteration(
    state: AepoState, aepo: ConfigDict, drawn: Sequence[RolloutTree], sums: Mapping[str, np.ndarray], kept_share: float
) -> AepoState:
    """Returns the state after an iteration that drew these scored trees; `sums` are those of `Learner.update`.

    Thresholds and targets are measured on roots.
    """
    windows = np.concatenate([tree.windows[tree.is_root] for tree in drawn]).astype(float)
    buckets = np.repeat([tree.difficulty for tree in drawn], [int(tree.is_root.sum()) for tree in drawn])
    with np.errstate(invalid="ignore"):
        control = sums["control_kl"] / sums["control_tokens"] if "control_kl" in sums else np.full(3, math.nan)
    return updated_state(
        state, aepo, batch_tau=trees_threshold(drawn, aepo), window_means=bucket_means(windows, buckets)[0],
        control_kl=control, kept_share=kept_share,
    )  # fmt: skip


def to_json(state: AepoState) -> dict[str, Any]:
    """Returns the state as JSON values (NaN becomes null)."""

    def plain(x: float):
        return None if math.isnan(x) else float(x)

    return {
        name: [plain(x) for x in value] if value.ndim else plain(float(value)) for name, value in state._asdict().items()
    }


def from_json(value: dict[str, Any]) -> AepoState:
    """Inverse of `to_json`."""

    def number(x):
        return math.nan if x is None else x

    return AepoState(
        **{name: np.array([number(i) for i in x] if isinstance(x, list) else number(x)) for name, x in value.items()}
    )
