"""Forward, train step and decoding of a 200 M-parameter Qwen2.5-VL against `transformers`' PyTorch, same weights, one run.

    python -m benchmarks.model [--repeats=5] [--only=forward,decode,train] [--dtype=bfloat16]

Width 768, 12 layers, 12 query and 2 key/value heads, vocabulary 151,936; on a GPU the 3B shape, too. float32; there bf16.
The contestants take turns and the best of their times counts, so that a busy machine disturbs both alike. What they compute
is compared, too: logits, loss, gradient norm, tokens. Beside the ratios stands what the machine allows: the matrix products
alone at the speed of a large square one, or the bytes of the weights at the speed at which a large array is read; and where
the datasheet's peak is known the MFU.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from flax import nnx
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.checkpoints import save_hf
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.parallel.chips import peak_flops
from ares_jax.parallel.sharding import make_mesh, place_model
from ares_jax.params import to_flat, with_params
from ares_jax.sampling.programs import DecodeState, Programs, Prompts, cut_layers, leaf_keys
from ares_jax.training import Update, initial_state
from ares_jax.training.log_probs import token_statistics
from kernels.logits import token_logits

_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each contestant; the best counts.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", ["forward", "decode", "train"], "What to measure.")

_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of weights and arithmetic; by default as above.")

_SMALL = TextConfig(151_936, 768, 2048, 12, 12, 2, (8, 12, 12))  # 190 M parameters, the embedding tied
_LARGE = TextConfig(151_936, 2048, 11_008, 36, 16, 2, (16, 24, 24))  # 3B
_ROWS, _LENGTH = 4, 256  # of the forward pass and the train step
_SEQUENCES, _PROMPT, _NEW = 8, 32, 32  # of decoding
_PAGE = 32


def main(_) -> None:
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(_DTYPE.value or ("bfloat16" if gpu else "float32"))
    limit = _Machine(dtype)
    for text in (_SMALL, _LARGE) if gpu else (_SMALL,):
        _measure(text, dtype, limit, "cuda" if gpu else "cpu")


def _measure(text: TextConfig, dtype: jnp.dtype, limit: "_Machine", device: str) -> None:
    vision = VisionConfig(320, 640, 2, 4, (1,))
    config = Qwen25VLConfig(text, vision, 151_655, 151_656, 151_652, 151_653)
    model = Qwen25VL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model")
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            Path(folder) / "model", dtype=getattr(torch, dtype.name)
        ).to(device)
    params = to_flat(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 150_000, (_ROWS, _LENGTH)).astype(np.int32)
    weights = sum(p.size for name, p in params.items() if name.startswith("text.layers")) + params["text.embedding"].size
    print(f"\n{jax.devices()[0].device_kind}, {weights / 1e6:,.0f} M weights in the decoder, {dtype.name}\n")
    print("| what | ours | transformers | ratio | the machine allows | MFU | same result |\n" + "|---" * 7 + "|")
    if "forward" in _ONLY.value:
        flops = 2 * weights * tokens.size
        _row("forward, logits of 4 x 256 tokens", _forward(model, params, theirs, tokens), flops / limit.flops, flops)
    if "decode" in _ONLY.value:
        floor = weights * dtype.itemsize / limit.bandwidth * _NEW
        flops = 2 * weights * _SEQUENCES * (_PROMPT + _NEW)
        _row(f"decoding, {_SEQUENCES} x {_NEW} tokens", _decode(model, params, theirs, tokens), floor, flops)
    if "train" in _ONLY.value:  # last: it changes PyTorch's weights
        flops = 6 * weights * tokens.size
        _row("train step, 4 x 256 tokens, AdamW", _train(model, params, theirs, tokens), flops / limit.flops, flops)


class _Machine:
    """What one large product and reading one large array reach here: FLOP/s and bytes/s."""

    def __init__(self, dtype):
        a = jnp.ones((2048, 2048), dtype)
        product, read = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32)), jax.jit(jnp.max)
        self.flops = 2 * 2048**3 / _best(lambda: product(a, a).block_until_ready())
        big = jnp.ones((1024, 2**17), dtype)
        self.bandwidth = big.nbytes / _best(lambda: read(big).block_until_ready())


def _best(f: Callable[[], Any]) -> float:
    return min(_seconds(f) for _ in range(5))


def _seconds(f: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


_Contest = tuple[Callable[[], Any], Callable[[], Any], Callable[[Any, Any], str]]


def _row(name: str, contest: _Contest, floor: float, flops: float) -> None:
    """Times the two contestants in turns, after a first call each, whose results are compared."""
    ours, theirs, compare = contest
    same = compare(ours(), theirs())
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(_REPEATS.value)]
    a, b = (min(column) for column in zip(*times, strict=True))
    peak = peak_flops(jax.devices()[0].device_kind)
    mfu = f"{flops / a / peak:.1%}" if peak else "-"
    cells = name, f"{a:.3f} s", f"{b:.3f} s", f"{b / a:.2f} x", f"{floor:.3f} s ({floor / a:.0%})", mfu, same
    print("| " + " | ".join(cells) + " |", flush=True)


def _forward(model: Qwen25VL, params: dict, theirs: torch.nn.Module, tokens: np.ndarray):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (len(tokens), 3, tokens.shape[1]))

    @jax.jit
    def logits(params, tokens):
        bound = with_params(model, params)
        hidden = bound(tokens, positions, jnp.ones_like(tokens))
        return token_logits(hidden.reshape(tokens.size, -1), bound.head, 1.0, None).reshape(*tokens.shape, -1)

    def ours():
        return logits(params, tokens).block_until_ready()

    @torch.no_grad()
    def other():
        out = theirs(input_ids=torch.tensor(tokens, dtype=torch.long, device=theirs.device)).logits
        return out[0, 0, 0].item() and out  # waits for a GPU

    return ours, other, lambda a, b: f"max error {np.abs(np.asarray(a, np.float32) - b.float().cpu().numpy()).max():.1e}"


def _train(model: Qwen25VL, params: dict, theirs: torch.nn.Module, tokens: np.ndarray):
    """Mean cross-entropy of every next token, gradient, clipping, AdamW. Both go on from their own last weights."""
    rows, length = tokens.shape
    patches = {"patches": np.zeros((rows, 4, 1176), np.float32), "patch_positions": np.zeros((rows, 4, 2), np.int32)}
    layout = {name: np.zeros((rows, 4), np.int32) for name in ("patch_window_ids", "patch_frame_ids")}
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, 3, length))
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens), **patches, **layout}
    statistics = token_statistics(model, jnp.zeros(model.config.text.vocab_size, bool))

    def loss(params, batch):
        return -statistics(params, batch)[0][:, 1:].mean(), {}

    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    placement = place_model(model, make_mesh(devices=jax.devices()[:1]))

    def text(name: str) -> bool:
        return name.startswith("text.")

    update = Update(loss, adamw, placement, text)
    state = initial_state(placement.put(jax.tree.map(jnp.copy, params)), adamw, placement, text)

    def ours():
        nonlocal state
        state, metrics = update(state, [batch])
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    theirs.train()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".visual." not in name)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4)

    def other():
        ids = torch.tensor(tokens, dtype=torch.long, device=theirs.device)
        optimizer.zero_grad()
        value = theirs(input_ids=ids, labels=ids).loss
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return {"loss": value.item(), "grad_norm": float(norm)}

    def compare(a, b):
        return ", ".join(f"{name} {a[name]:.5f} and {b[name]:.5f}" for name in a)

    return ours, other, compare


def _decode(model: Qwen25VL, params: dict, theirs: torch.nn.Module, tokens: np.ndarray):
    """Greedy, eight prompts of equal length, the cache filled by each side's own prefill, log-prob and entropy with ours."""
    prompts = tokens.reshape(-1, _PROMPT)[:_SEQUENCES]
    c, v = model.config.text, model.config.text.vocab_size
    per_row = (_PROMPT + _NEW) // _PAGE
    none = jnp.zeros(v, bool)
    programs = Programs(
        model, eos_token_ids=(-1,), banned=none, trigger=none, steps=_NEW, prefill_layers=c.num_layers
    )  # fmt: skip
    table = jnp.arange(1, 1 + _SEQUENCES * per_row, dtype=jnp.int32).reshape(_SEQUENCES, per_row)
    shape = (c.num_layers, 1 + table.size, _PAGE, 2 * c.num_kv_heads, c.head_dim)
    positions = jnp.broadcast_to(jnp.arange(_PROMPT, dtype=jnp.int32), (_SEQUENCES, 3, _PROMPT))
    ones = jnp.ones(_SEQUENCES, jnp.int32)
    rows = DecodeState(
        token=jnp.asarray(prompts[:, -1]), length=ones * (_PROMPT - 1), response_index=ones * 0, alive=ones > 0,
        rope_delta=ones * 0, end=ones * _NEW, key=leaf_keys(jax.random.key(0), _SEQUENCES), temperature=ones * 0.0,
        top_p=ones * 1.0,
        top_k=ones * 0, tau_high=ones * jnp.inf, ring=jnp.zeros((_SEQUENCES, 4)),
        ring_tokens=jnp.zeros((_SEQUENCES, 4), jnp.int32),
    )  # fmt: skip
    pages, arranged = jnp.zeros(shape, model.text.dtype), cut_layers(params)  # as the engine does

    def ours():
        nonlocal pages
        filled = programs.prefill(arranged, pages, Prompts(prompts, positions, np.ones_like(prompts), table[:, :1], None))
        pages, _, drawn = programs.decode(arranged, filled, table, rows)
        return np.asarray(drawn.token).T

    def other():
        ids = torch.tensor(prompts, dtype=torch.long, device=theirs.device)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False
        )
        return out[:, _PROMPT:].cpu().numpy()

    theirs.eval()
    return ours, other, lambda a, b: f"{(a == b).mean():.1%} of tokens"


if __name__ == "__main__":
    app.run(main)
