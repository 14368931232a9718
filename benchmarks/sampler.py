"""Tokens per second of the engine, of `transformers.generate` and of Tunix's sampler: same weights, one run.

    python -m benchmarks.sampler [--tunix=FOLDER] [--rows=1,8,64] [--new=32]

A text model of 197 M random parameters (hidden 768, 12 layers, 12/2 heads, vocabulary 151,936) in float32; prompts of 64
random tokens; plain sampling at temperature 1 (the engine gives log-probabilities and exact entropies besides). Nothing
stops before --new tokens. Contestants take turns, the best of several rounds counts. Then rollouts of 8 leaves, half of
them branches, with the pages of prompt and parent shared, and the same leaves without sharing.

Tunix is no dependency: `pip install --target=FOLDER --no-deps google-tunix` (and what it imports) makes --tunix=FOLDER.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from flax import nnx
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.checkpoints import save_hf
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.models.qwen2_5_vl.model import new_model
from ares_jax.params import to_flat
from ares_jax.sampling import Engine, EngineOptions, RolloutRequest

_ROWS = flags.DEFINE_list("rows", ["1", "8", "64"], "sequences at once")
_NEW = flags.DEFINE_integer("new", 32, "tokens a sequence")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "each contestant runs once a round")
_TUNIX = flags.DEFINE_string("tunix", "", "folder with google-tunix; empty: without it")

_PROMPT, _EOS, _VOCABULARY = 64, 151_645, 151_936
_CONFIG = Qwen25VLConfig(
    TextConfig(_VOCABULARY, 768, 2304, 12, 12, 2, (8, 12, 12)), VisionConfig(32, 48, 2, 2, (1,)),
    151_655, 151_656, 151_652, 151_653,
)  # fmt: skip


def main(_: Sequence[str]) -> None:
    model = new_model(_CONFIG, 0)
    flat = to_flat(model)
    print(f"{sum(value.size for value in flat.values()) / 1e6:.0f} M parameters, {_NEW.value} tokens a sequence\n")
    contestants: dict[str, Callable[[np.ndarray], None]] = {"engine": _engine(model)}
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        contestants["transformers"] = _transformers(folder)
    if _TUNIX.value:
        contestants["tunix"] = _tunix(flat)
    print("| sequences | " + " | ".join(contestants) + " | engine / " + " | engine / ".join([*contestants][1:]) + " |")
    print("|---" * (2 * len(contestants)) + "|")
    for rows in map(int, _ROWS.value):
        prompts = np.random.default_rng(rows).integers(0, 150_000, (rows, _PROMPT)).astype(np.int32)
        best = {name: math.inf for name in contestants}
        for turn in range(_ROUNDS.value + 1):  # the first one compiles
            for name, sample in contestants.items():
                begin = time.perf_counter()
                sample(prompts)
                best[name] = min(best[name], time.perf_counter() - begin) if turn else best[name]
        speed = [rows * _NEW.value / seconds for seconds in best.values()]
        print(
            f"| {rows} | " + " | ".join([*(f"{s:.1f}" for s in speed), *(f"{speed[0] / s:.2f}" for s in speed[1:])]) + " |"
        )
    _rollouts(model)


def _new_engine(model, slots: int) -> Engine:
    options = EngineOptions(
        max_slots=slots, page_size=16, num_pages=(slots + 1) * (2 + (_PROMPT + _NEW.value) // 16), max_prompt_tokens=_PROMPT,
        max_prompt_patches=4, max_context_tokens=_PROMPT + _NEW.value, prefill_batch=8, decode_steps=16, window=4,
    )  # fmt: skip
    never = np.zeros(_VOCABULARY, bool)
    never[_EOS] = True  # nothing stops early
    always = np.ones(_VOCABULARY, bool)
    return Engine(model, options, eos_token_ids=[_EOS], banned=never, trigger_mask=always)


def _request(prompt: np.ndarray, seed: int, leaves: int = 1, roots: int = 1, tau: float = math.inf) -> RolloutRequest:
    return RolloutRequest(
        str(seed), prompt, np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32),
        np.broadcast_to(np.arange(len(prompt), dtype=np.int32), (3, len(prompt))), 0, seed, leaves, roots, 2, tau,
        "window_end", "first", 1.0, 1.0, 0, _NEW.value,
    )  # fmt: skip


def _engine(model) -> Callable[[np.ndarray], None]:
    engines = cache(partial(_new_engine, model))  # as many slots as sequences: the others compile for the number they get

    def sample(prompts):
        groups = engines(len(prompts)).generate([_request(prompt, seed) for seed, prompt in enumerate(prompts)])
        assert all(len(group.leaves[0].token_ids) == _NEW.value for group in groups)

    return sample


def _transformers(folder: str) -> Callable[[np.ndarray], None]:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def sample(prompts):
        out = model.generate(
            input_ids=torch.tensor(prompts, dtype=torch.long), attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=_NEW.value, min_new_tokens=_NEW.value,
            eos_token_id=_EOS, pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == _PROMPT + _NEW.value

    return sample


class _Identity:
    """A tokenizer for prompts that are token ids already, written out in digits."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return _EOS

    def pad_id(self) -> int:
        return 151_643


def _tunix(flat: dict[str, jax.Array]) -> Callable[[np.ndarray], None]:
    sys.path.append(_TUNIX.value)
    from tunix.generate.sampler import CacheConfig, Sampler  # type: ignore[import-not-found]
    from tunix.models.qwen2.model import ModelConfig, Qwen2  # type: ignore[import-not-found]

    t = _CONFIG.text
    config = ModelConfig(
        num_layers=t.num_layers, vocab_size=t.vocab_size, embed_dim=t.hidden_size, hidden_dim=t.intermediate_size,
        num_heads=t.num_heads, head_dim=t.head_dim, num_kv_heads=t.num_kv_heads, rope_theta=int(t.rope_theta),
        norm_eps=t.rms_norm_eps, use_tied_embedding=True,
    )  # fmt: skip
    model = Qwen2(config, rngs=nnx.Rngs(0))
    model.embedder.input_embedding.value = flat["text.embedding"]
    model.final_norm.w.value = flat["text.norm"]
    for index, layer in enumerate(model.layers):
        own = {name.removeprefix("text.layers."): v[index] for name, v in flat.items() if name.startswith("text.layers.")}
        for target, name in (
            (layer.input_layernorm.w, "norm1"), (layer.post_attention_layernorm.w, "norm2"),
            (layer.attn.q_proj.w, "q_kernel"), (layer.attn.k_proj.w, "k_kernel"), (layer.attn.v_proj.w, "v_kernel"),
            (layer.attn.o_proj.w, "out_kernel"), (layer.attn.q_bias, "q_bias"), (layer.attn.k_bias, "k_bias"),
            (layer.attn.v_bias, "v_bias"), (layer.mlp.gate_proj.kernel, "gate_kernel"),
            (layer.mlp.up_proj.kernel, "up_kernel"), (layer.mlp.down_proj.kernel, "down_kernel"),
        ):  # fmt: skip
            target.value = own[name].reshape(target.value.shape)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    logits, _ = model(tokens, tokens, None, jnp.tril(jnp.ones((1, 8, 8), bool)))
    hidden = new_model(_CONFIG, 0)(tokens, jnp.broadcast_to(tokens[:, None], (1, 3, 8)), jnp.ones((1, 8), jnp.int32))
    np.testing.assert_allclose(logits[0], hidden[0] @ flat["text.embedding"].T, atol=2e-3)  # the same model
    sampler = Sampler(model, _Identity(), CacheConfig(_PROMPT + _NEW.value, t.num_layers, t.num_kv_heads, t.head_dim))

    def sample(prompts):
        sampler(
            [" ".join(map(str, prompt)) for prompt in prompts], max_generation_steps=_NEW.value,
            max_prompt_length=_PROMPT, temperature=1.0, top_p=1.0, seed=0, forbidden_tokens=(_EOS,),
        )  # fmt: skip

    return sample


def _rollouts(model) -> None:
    """8 leaves of 4 prompts, with what they share computed once, and every leaf on its own."""
    prompts = np.random.default_rng(0).integers(0, 150_000, (4, _PROMPT)).astype(np.int32)
    shared = [_request(prompt, seed, leaves=8, roots=4, tau=0.0) for seed, prompt in enumerate(prompts)]
    apart = [_request(prompt, 8 * seed + leaf) for seed, prompt in enumerate(prompts) for leaf in range(8)]
    engine = _new_engine(model, 32)
    print("\n| rollouts of 4 x 8 leaves | seconds | tokens computed | delivered | computed / delivered | branches |")
    print("|---|---|---|---|---|---|")
    results: dict[str, tuple] = {}
    for turn in range(_ROUNDS.value + 1):
        for name, requests in (("shared", shared), ("each leaf on its own", apart)):
            before = engine.stats()
            begin = time.perf_counter()
            groups = engine.generate(requests)
            seconds = time.perf_counter() - begin
            after = engine.stats()
            computed = sum(after[k] - before[k] for k in ("prefilled", "decoded"))
            delivered = sum(_PROMPT + len(leaf.token_ids) for group in groups for leaf in group.leaves)
            expected = sum(group.computed_tokens for group in groups)
            assert computed <= 1.02 * expected, (computed, expected)
            if turn and (name not in results or seconds < results[name][0]):
                results[name] = seconds, computed, delivered, sum(group.branches for group in groups)
    for name, (seconds, computed, delivered, branches) in results.items():
        print(f"| {name} | {seconds:.2f} | {computed:,} | {delivered:,} | {computed / delivered:.3f} | {branches} |")


if __name__ == "__main__":
    app.run(main)
