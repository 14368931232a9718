"""A tiny digits model shared by tests: random weights, real tokenizer and image processor."""

import functools

import jax
import numpy as np

from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, TextConfig, VisionConfig, attention
from ares_jax.models.qwen2_5_vl.blockwise import blockwise_attention
from ares_jax.models.qwen2_5_vl.model import new_model
from ares_jax.parallel.sharding import make_mesh, place_model
from ares_jax.sampling import Engine, EngineOptions
from data_pipeline import digits, tokenizer
from data_pipeline.prompts import PromptEncoder

VOCABULARY = 448
# Of configs/digits_cpu.py: a run of all commands in a minute. Whoever makes one shares its compiled programs.
TINY_RUN = {
    "model.text.hidden_size": 64, "model.text.intermediate_size": 96, "model.text.num_layers": 2,
    "model.text.mrope_section": (2, 3, 3), "data.validation": ("digits://validation?size=6",),
    "data.test": ("digits://test?size=6",), "sampler.slots": 32, "sampler.pages": 500, "sampler.max_response_tokens": 32,
    "packing.rows": 4, "cold_start.alignment_steps": 2, "cold_start.warmup_steps": 2, "cold_start.pass_rate_problems": 8,
    "cold_start.pass_rate_samples": 2, "cold_start.selected": 8, "cold_start.epochs": 1, "cold_start.batch_size": 4,
    "aepo.steps": 3, "aepo.prompts_per_step": 2, "aepo.save_every": 1, "aepo.filter.low": -9.0, "aepo.filter.high": 9.0,
    "aepo.log_rollouts_every": 1,
}  # fmt: skip


@functools.cache
def encoder() -> PromptEncoder:
    return PromptEncoder(
        tokenizer.train_tokenizer(digits.corpus(), VOCABULARY), tokenizer.make_image_processor(784, 784 * 64)
    )


@functools.cache
def model():
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    config = Qwen25VLConfig(
        TextConfig(VOCABULARY, 64, 96, 2, 4, 2, (2, 3, 3), 1e4), VisionConfig(32, 48, 2, 2, (1,)),
        *encoder().tokenizer.convert_tokens_to_ids(names),
    )  # fmt: skip
    return new_model(config, 0)


def placement(*, fsdp: int = 1, tensor: int = 1):
    return place_model(model(), make_mesh(fsdp=fsdp, tensor=tensor, devices=jax.devices()[: fsdp * tensor]))


def prompts(count: int):
    source = digits.DigitsSource("train", count, seed=0)
    return [encoder()(source[i]) for i in range(count)]


@functools.cache
def banned() -> np.ndarray:
    """Returns what is never drawn, [V]. A drawn image token would be a word to the sampler, and an image to the learner."""
    text, mask = encoder().tokenizer, np.arange(VOCABULARY) >= len(encoder().tokenizer)
    mask[text.convert_tokens_to_ids(list(tokenizer.NEVER_SAMPLED))] = True
    return mask


def engine(
    *,
    pages: int = 400,
    slots: int = 32,
    window: int = 3,
    prefill_layers: int = 16,
    prefill_chunk: int = 0,
    other: Qwen25VL | None = None,
    one_shape: bool = False,
) -> Engine:
    """Returns an engine for the shared model, or another, where its parameters lie."""
    trigger = np.random.default_rng(0).random(VOCABULARY) < 0.3  # a random model says trigger words by chance
    options = EngineOptions(
        slots, 8, pages, 64, 48, 128, 4, 5, window,
        prefill_layers=prefill_layers, prefill_chunk=prefill_chunk, one_shape=one_shape,
    )  # fmt: skip
    eos = [encoder().tokenizer.eos_token_id]
    return Engine(
        other or model(), options, eos_token_ids=eos, banned=banned(), trigger_mask=trigger,
        token_bytes=tokenizer.token_bytes(encoder().tokenizer),
    )  # fmt: skip


def attend_in_blocks(monkeypatch, *, block: int) -> set[tuple[int, int]]:
    """Attends rows of more than 16 tokens tile by tile, as long ones are. Returns the (queries, keys) of those to come."""
    shapes = set()

    def in_blocks(query, key, *others, causal):
        shapes.add((query.shape[1], key.shape[1]))
        return blockwise_attention(query, key, *others, causal=causal, block=block)

    monkeypatch.setattr(attention, "LONGEST_DENSE", 16)
    monkeypatch.setattr(attention, "blockwise_attention", in_blocks)
    return shapes
