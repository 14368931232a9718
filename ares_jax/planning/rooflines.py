"""Bounds of each compiled program by the chip's datasheet: arithmetic, memory, network."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from ares_jax.checkpoints.huggingface import read_config
from ares_jax.errors import UserError
from ares_jax.models.flops import Flops, forward_flops, gradient_flops, model_flops
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.paged import cached_heads, paged_implementation
from ares_jax.parallel.chips import Chip
from ares_jax.planning.aot import Compiled
from ares_jax.sampling.shapes import prompts_together

GIB = 2**30


class Bound(NamedTuple):
    """Seconds that a program cannot be faster than, by each of what a chip has."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self)


def model_shape(config: ConfigDict) -> Qwen25VLConfig:
    """Returns the shape of the checkpoint, or the published one of `model.shape`. Raises `UserError` without either."""
    m = config.model
    if m.pretrained:
        return read_config(Path(m.pretrained))
    if m.shape not in PUBLISHED:
        raise UserError(f"model.shape={m.shape!r} is not one of {', '.join(PUBLISHED)}; or set model.pretrained")
    return PUBLISHED[m.shape]


def row_flops(config: ConfigDict, shape: Qwen25VLConfig) -> Flops:
    """Returns the operations of a pass over a full row, taken as one segment: the most it can cost."""
    p = config.packing
    frame = config.data.max_pixels // shape.vision.patch_size**2
    return forward_flops(shape, tokens=p.row_tokens, patches=p.row_patches, context=p.row_tokens / 2, frame=frame)


def kernel_flops(config: ConfigDict, shape: Qwen25VLConfig, chips: int, platform: str = "tpu") -> dict[str, float]:
    """Returns each program's operations on one chip inside kernels, and loops over tiles: the compiler's text has none."""
    s, rows = config.sampler, config.packing.rows / chips
    row = row_flops(config, shape)
    frame = min(config.data.max_pixels // shape.vision.patch_size**2, s.max_prompt_patches)
    prompt = forward_flops(
        shape, tokens=s.max_prompt_tokens, patches=s.max_prompt_patches, context=s.max_prompt_tokens / 2, frame=frame
    )
    return {
        "log_probs": rows * row.attention, "more": rows * gradient_flops(row, remat=config.model.remat).attention,
        "prefill": prompts_together(s.max_prompt_tokens, s.prefill_chunk, s.prefill_batch) * prompt.attention / s.tensor,
        "decode": s.slots * s.decode_steps * _token_flops(config, shape, platform) / s.tensor,
    }  # fmt: skip


def _token_flops(config: ConfigDict, shape: Qwen25VLConfig, platform: str) -> float:
    """Returns a decoded token's operations in kernels, at full length: the head's and attention's, where there are such."""
    s, t = config.sampler, shape.text
    head = 2 * t.hidden_size * t.vocab_size if s.kernel in ("tpu", "gpu") else 0
    context = s.max_prompt_tokens + s.max_response_tokens
    kept = cached_heads(t.num_heads, t.num_kv_heads, s.tensor)
    on_a_chip = kept if kept % s.tensor else kept // s.tensor
    kind = paged_implementation(platform, jnp.dtype(config.model.dtype), on_a_chip, t.head_dim, s.paged_attention)
    attention = 4 * t.num_layers * t.num_heads * t.head_dim * context
    return head + (0 if kind == "gather" else attention)


def bound(program: Compiled, kernels: float, chip: Chip) -> Bound:
    """Returns the roofline of a program that does `kernels` operations besides the counted ones."""
    w = program.work
    return Bound((w.flops + kernels) / chip.flops, w.bytes / chip.bandwidth, sum(w.collective.values()) / chip.link)


class Rate(NamedTuple):
    """Bounds of a micro-batch's passes on all chips: everything at once, and one after another."""

    tokens: float  # a second
    mfu: float
    mfu_one_by_one: float


def throughput(
    config: ConfigDict, shape: Qwen25VLConfig, programs: dict[str, Compiled], chip: Chip, chips: int
) -> Rate | None:
    """Returns what the gradients and, if compiled, the reference's log-probs allow; None where one does not fit."""
    passes = {name: programs[name] for name in ("log_probs", "more") if name in programs}
    if any(p.refused or p.peak > chip.usable * GIB for p in passes.values()):
        return None
    kernels = kernel_flops(config, shape, chips)
    bounds = [bound(p, kernels[name], chip) for name, p in passes.items()]
    seconds = sum(b.seconds for b in bounds)
    rows, row = config.packing.rows, row_flops(config, shape)
    useful = rows * (model_flops(row) + ("log_probs" in passes) * sum(row)) / (chip.flops * chips)
    return Rate(rows * config.packing.row_tokens / seconds, useful / seconds, useful / sum(map(sum, bounds)))


def assumptions(chip: Chip) -> str:
    """Returns what the times rest on."""
    return (
        f"Bounds, not measurements: {chip.flops / 1e12:.0f} bf16 TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of memory and "
        f"{chip.link / 1e9:.0f} GB/s sent over all links (datasheet), all reached. Every row is one full segment. Loops "
        "count as often as they run; attention's kernels and tiles by hand. Moved: what each fused step reads and writes."
    )
