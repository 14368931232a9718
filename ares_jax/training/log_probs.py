"""Log-probability and entropy of every token of a packed micro-batch, from flat parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ares_jax.checkpoints.params import with_params
from ares_jax.models.qwen2_5_vl import Qwen25VL, VisionInputs
from ares_jax.training.update import Batch, Params
from kernels import token_log_probs_and_entropy

TokenStatistics = Callable[[Params, Batch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]


def token_statistics(
    model: Qwen25VL, banned: Bool[Array, "V"], *, freeze_vision: bool, temperature: float = 1.0
) -> TokenStatistics:
    """Returns `f(params, batch) -> (log_probs [B, T], entropies [B, T])`, in nats, pure and differentiable in `params`.

    The value at t concerns the token at t, drawn from the distribution that the tokens before it give; it is 0 at t = 0,
    and means nothing at padding and at the first token of a segment. `banned` tokens are outside the distribution, as
    they are in the sampler. With `freeze_vision` no gradient reaches the vision tower. `model` gives the
    structure (it may be abstract); `batch` holds the arrays of `data_pipeline.packing.pack`.
    """

    def statistics(params, batch):
        if freeze_vision:
            params = {n: jax.lax.stop_gradient(p) if n.startswith("visual.") else p for n, p in params.items()}
        policy = with_params(model, params)
        vision = VisionInputs(
            batch["patches"], batch["patch_positions"], batch["patch_window_ids"], batch["patch_frame_ids"]
        )
        hidden = policy(batch["tokens"], batch["positions"], batch["segment_ids"], vision)
        rows, length, width = hidden.shape
        log_probs, entropies = token_log_probs_and_entropy(
            hidden[:, :-1].reshape(-1, width), policy.head, batch["tokens"][:, 1:].reshape(-1),
            temperature=temperature, banned=banned,
        )  # fmt: skip
        at_token = ((0, 0), (1, 0))
        return (
            jnp.pad(log_probs.reshape(rows, length - 1), at_token),
            jnp.pad(entropies.reshape(rows, length - 1), at_token),
        )

    return statistics
