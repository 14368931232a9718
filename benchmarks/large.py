"""The learner's update and rollouts at a published shape in bfloat16, beside PyTorch: what `learner --large` runs.

    python -m benchmarks.learner --config=configs/qwen2_5_vl_3b_aepo.py --workdir=runs/benchmark --large [--new=256]

An update: the reference's log-probs, the gradient, clipping and AdamW in float32, on eight random leaves of 1,024 tokens, in
rows of 4,096 here, in batches of four there (no padding in either). PyTorch multiplies under autocast. Rollouts: 64 prompts
of 512 random tokens, --new tokens each, plain sampling, against `transformers.generate` in bfloat16.

Each contestant is a process of its own, one after the other, so that its peak memory is its own; both begin with the same
weights, from the same folder, and losses are compared. MFU counts what a model needs, once (`ares_jax/models/flops.py`),
against the datasheet; a machine without one there (a CPU) gets none. Without `model.shape` a tiny model is measured: a
rehearsal.
"""

import copy
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from ml_collections import ConfigDict
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.aepo.learner import Learner
from ares_jax.aepo.state import initial_state as initial_aepo
from ares_jax.checkpoints import load_hf, save_hf
from ares_jax.models.flops import forward_flops, update_flops
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_model, new_model
from ares_jax.parallel.chips import peak_flops
from ares_jax.parallel.sharding import make_mesh, place_model
from ares_jax.params import to_flat
from ares_jax.sampling import Engine, EngineOptions, RolloutRequest
from ares_jax.training import initial_state, make_optimizer, trainable
from benchmarks.learner_peer import torch_optimizer, torch_update
from benchmarks.random_trees import leaf_segments, random_group
from data_pipeline.packing import Segment, pack
from data_pipeline.prompts import Prompt

_NEW = flags.DEFINE_integer("new", 256, "with --large: tokens that each sequence of the rollouts gets")
_TINY = Qwen25VLConfig(
    TextConfig(4096, 256, 512, 2, 4, 2, (8, 12, 12)), VisionConfig(32, 48, 2, 2, (1,)), 100, 101, 102, 103
)


class _Sizes(NamedTuple):
    """Tokens of the prompt, the response and the row of an update; sequences and tokens of a prompt of the rollouts."""

    prompt: int = 128
    response: int = 896
    row: int = 4096
    sequences: int = 64
    asked: int = 512


_REPEATS = 5


def measure(config: ConfigDict, workdir: Path) -> None:
    """Prints the two tables."""
    sizes = _sizes(config)
    config.mesh.update(data=1, fsdp=1, sequence=1, tensor=1)
    config.packing.update(rows=1, row_tokens=sizes.row, row_patches=4, halvings=0)
    arguments = config, workdir / "weights", _NEW.value
    shutil.rmtree(workdir / "weights", ignore_errors=True)  # of another shape, perhaps
    _in_process(_write, *arguments)
    leaf = sizes.prompt + sizes.response
    print(f"| update of 8 leaves of {leaf} tokens | seconds | tokens/s | MFU | peak GB | loss | gradient norm |")
    print("|---" * 7 + "|")
    ours, theirs = (_show(name, f, arguments) for name, f in (("ours", _update), ("PyTorch", _torch_update)))
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0.02)
    print(f"\nours {theirs['seconds'] / ours['seconds']:.2f} x as fast\n")
    print(f"| {sizes.sequences} sequences, {sizes.asked} + {_NEW.value} tokens | seconds | tokens/s | MFU | peak GB |")
    print("|---" * 5 + "|")
    ours, theirs = (_show(name, f, arguments) for name, f in (("ours", _rollouts), ("transformers.generate", _generate)))
    print(f"\nours {theirs['seconds'] / ours['seconds']:.2f} x as fast")


def _show(name: str, contestant: Callable[..., dict[str, Any]], arguments: tuple) -> dict[str, Any]:
    found = _in_process(contestant, *arguments)
    peak = peak_flops(found["device"])
    mfu = f"{found['flops'] / found['seconds'] / peak:.1%}" if peak else "-"
    cells = [f"{found['seconds']:.3f}", f"{found['tokens'] / found['seconds']:,.0f}", mfu, f"{found['peak'] / 1e9:.1f}"]
    cells += [f"{found[key]:.5f}" for key in ("loss", "grad_norm") if key in found]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return found


def _in_process(f: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `f` does in a process of its own, which then gives all memory back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, arguments)


def _shape(config: ConfigDict) -> Qwen25VLConfig:
    return PUBLISHED[config.model.shape] if config.model.shape else _TINY


def _sizes(config: ConfigDict) -> _Sizes:
    return _Sizes() if config.model.shape else _Sizes(16, 48, 256, 4, 64)


def _write(config: ConfigDict, folder: Path, new: int) -> None:
    """Random weights of which bfloat16 loses nothing, as published ones are."""
    save_hf(new_model(_shape(config), 0, param_dtype=jnp.bfloat16), folder)


def _prompt(rng: np.random.Generator, tokens: int, vocabulary: int) -> Prompt:
    ids = rng.integers(200, vocabulary - 2000, tokens).astype(np.int32)
    places = np.broadcast_to(np.arange(tokens, dtype=np.int32), (3, tokens))
    return Prompt("", "", "", "", "", ids, np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32), places, 0)


def _leaves(config: ConfigDict) -> tuple[list[Segment], np.ndarray]:
    """Returns the leaves of an update, all equally long, and which tokens are banned: none."""
    sizes, rng, vocabulary = _sizes(config), np.random.default_rng(0), _shape(config).text.vocab_size
    allowed = np.zeros(vocabulary, bool)
    allowed[200 : vocabulary - 2000] = True
    prompt, longest = _prompt(rng, sizes.prompt, vocabulary), sizes.response + 1
    group = random_group(prompt, rng, allowed, shortest=sizes.response, longest=longest)
    segments = leaf_segments([group], initial_aepo(config.aepo)._replace(tau_high=np.array(0.5)), config.aepo)
    return segments, np.zeros(vocabulary, bool)


def _result(times: Sequence[float], tokens: int, flops: float, **more: Any) -> dict[str, Any]:
    found = {"seconds": min(times), "tokens": tokens, "flops": flops, **more}
    if "device" not in found:
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        found.update(device=device.device_kind, peak=peak)
    return found


def _torch_result(*arguments: Any, **more: Any) -> dict[str, Any]:
    there = {"device": "cpu", "peak": 0}
    if torch.cuda.is_available():
        there = {"device": torch.cuda.get_device_name(), "peak": torch.cuda.max_memory_allocated()}
    return _result(*arguments, **there, **more)


def _finished() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _update(config: ConfigDict, folder: Path, new: int) -> dict[str, Any]:
    shape, (leaves, banned) = _shape(config), _leaves(config)
    model = abstract_model(shape, dtype=jnp.bfloat16, param_dtype=jnp.float32, remat=config.model.remat)
    place = place_model(model, make_mesh(**config.mesh, devices=jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, learning_rate=1e-6, steps=100)
    trained = trainable(config.optimizer)
    learner = Learner(model, banned, optimizer, config.aepo, place, temperature=1.0, trainable=trained)
    params = to_flat(load_hf(folder, mesh=place.mesh, dtype=jnp.float32))
    reference = {name: 0.99 * value for name, value in params.items()}
    state = initial_state(params, optimizer, place, trained)
    packed, times, first = pack(leaves, **config.packing), [], None
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        state, metrics = learner.update(state, packed, reference)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - begin)
        first = first or {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    flops = update_flops(shape, leaves, fixed_passes=1, freeze_vision=config.optimizer.freeze_vision)
    return _result(times[1:], sum(len(s.token_ids) for s in leaves), flops, **(first or {}))


def _torch_update(config: ConfigDict, folder: Path, new: int) -> dict[str, Any]:
    leaves, banned = _leaves(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.99)
    if config.model.remat in ("full", "offload"):
        policy.gradient_checkpointing_enable()
    policy.train()  # without it PyTorch keeps all, whatever was enabled
    optimizer, times, first = torch_optimizer(policy, config, 1e-6), [], None
    for _ in range(1 + _REPEATS):
        optimizer.zero_grad()
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            values = torch_update(policy, reference, optimizer, leaves, banned, config, batch=4)
        _finished()
        times.append(time.perf_counter() - begin)
        first = first or values
    flops = update_flops(_shape(config), leaves, fixed_passes=1, freeze_vision=config.optimizer.freeze_vision)
    return _torch_result(times[1:], sum(len(s.token_ids) for s in leaves), flops, **(first or {}))


def _asked(config: ConfigDict) -> list[Prompt]:
    sizes, rng = _sizes(config), np.random.default_rng(1)
    return [_prompt(rng, sizes.asked, _shape(config).text.vocab_size) for _ in range(sizes.sequences)]


def _rollout_flops(config: ConfigDict, new: int) -> float:
    """The decoder over prompts and answers; the head for each new token."""
    sizes = _sizes(config)
    tokens = sizes.asked + new
    one = forward_flops(_shape(config), tokens=tokens, patches=0, context=tokens / 2, frame=0)
    return sizes.sequences * (one.weights + one.attention + one.head * new / tokens)


def _rollouts(config: ConfigDict, folder: Path, new: int) -> dict[str, Any]:
    model: Qwen25VL = load_hf(folder, mesh=make_mesh(devices=jax.devices()[:1]), dtype=jnp.bfloat16)
    sizes, page = _sizes(config), 64
    vocabulary = model.config.text.vocab_size
    none = np.zeros(vocabulary, bool)
    none[0] = True  # the end of a turn: nothing stops early
    pages = 1 + (sizes.sequences + 1) * (2 + (sizes.asked + new) // page)
    options = EngineOptions(
        max_slots=sizes.sequences, page_size=page, num_pages=pages, max_prompt_tokens=sizes.asked, max_prompt_patches=4,
        max_context_tokens=sizes.asked + new, prefill_batch=8, decode_steps=16, window=4,
        kernel=config.sampler.kernel or "xla",
    )  # fmt: skip
    engine = Engine(model, options, eos_token_ids=[0], banned=none, trigger_mask=np.ones(vocabulary, bool))
    requests = [
        RolloutRequest(
            str(seed), p.token_ids, p.patches, p.grid_thw, p.positions, 0, seed, 1, 1, 0, float("inf"), "window_end",
            "first", 1.0, 1.0, 0, new,
        )  # fmt: skip
        for seed, p in enumerate(_asked(config))
    ]
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        groups = engine.generate(requests)
        times.append(time.perf_counter() - begin)
        assert all(len(group.leaves[0].token_ids) == new for group in groups)
    return _result(times[1:], len(requests) * new, _rollout_flops(config, new))


def _generate(config: ConfigDict, folder: Path, new: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    ids = torch.tensor(np.stack([p.token_ids for p in _asked(config)]), dtype=torch.long, device=device)
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new, min_new_tokens=new, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        _finished()
        times.append(time.perf_counter() - begin)
        assert out.shape[1] == ids.shape[1] + new
    return _torch_result(times[1:], len(ids) * new, _rollout_flops(config, new))


if __name__ == "__main__":
    sys.exit("python -m benchmarks.learner --large")
