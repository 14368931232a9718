"""Log-probability and entropy of every token of a packed micro-batch, from flat parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ares_jax.models.qwen2_5_vl import Qwen25VL, VisionInputs
from ares_jax.params import Params, with_params
from ares_jax.training.update import Batch
from kernels import token_log_probs_and_entropy

TokenStatistics = Callable[[Params, Batch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]


def token_statistics(model: Qwen25VL, banned: Bool[Array, "V"], *, temperature: float = 1.0) -> TokenStatistics:
    """Returns `f(params, batch) -> (log_probs [B, T], entropies [B, T])`, in nats, pure and differentiable in `params`.

    The value at t concerns the token at t, drawn from the distribution that the tokens before it give; it means nothing at
    padding and at the first token of a segment. Segments may be trees (`data_pipeline.tree_segments`). `banned` tokens are
    outside the distribution, as they are in the sampler.
    `model` gives the structure (it may be abstract); `batch` holds the arrays of `data_pipeline.packing.pack`.
    """

    def by_token(hidden, head, targets):
        def local(hidden, head, targets):
            return token_log_probs_and_entropy(hidden, head, targets, temperature=temperature, banned=banned)

        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or len(targets) % mesh.size:
            return local(hidden, head, targets)
        # Every device goes through its own tokens in chunks; left to the compiler, each would go through all of them.
        tokens = PartitionSpec(mesh.axis_names)
        specs = tokens, PartitionSpec(), tokens
        return jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)(hidden, head, targets)

    def statistics(params, batch):
        policy = with_params(model, params)
        vision = VisionInputs(
            batch["patches"], batch["patch_positions"], batch["patch_window_ids"], batch["patch_frame_ids"]
        )
        tree = "first_leaf" in batch
        leaf_spans = jnp.stack([batch["first_leaf"], batch["last_leaf"]], axis=1) if tree else None
        hidden = policy(batch["tokens"], batch["positions"], batch["segment_ids"], vision, leaf_spans)
        rows, length, width = hidden.shape
        if tree:
            predictor = jnp.maximum(jnp.arange(length) - batch["predictor_offset"], 0)
            hidden = jnp.take_along_axis(hidden, predictor[..., None], axis=1)
        else:
            hidden = jnp.roll(hidden, 1, axis=1)
        log_probs, entropies = by_token(hidden.reshape(-1, width), policy.head, batch["tokens"].reshape(-1))
        return log_probs.reshape(rows, length), entropies.reshape(rows, length)

    return statistics
