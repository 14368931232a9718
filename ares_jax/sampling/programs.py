"""The jitted programs of the engine: prefill into pages, some layers at a time, copy pages, decode several tokens."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ares_jax.models.qwen2_5_vl import Qwen25VL, VisionInputs
from ares_jax.models.qwen2_5_vl.paged import cache_spec
from ares_jax.parallel.sharding import mesh_axes
from ares_jax.params import to_flat, with_params
from kernels import WindowRing, sample_with_entropy, window_step


class Prompts(NamedTuple):
    """Prompts prefilled together, in pages of S = T / M tokens."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B 3 T"]
    segment_ids: Int[Array, "B T"]
    pages: Int[Array, "B M"]  # where keys and values go; 0: not needed
    vision: VisionInputs | None


class PrefillChunk(NamedTuple):
    """Some layers of a prefill, from layer `first` on, over whole prompts or some of their tokens."""

    tower: bool  # of the vision tower, else of the text decoder
    first: int
    layers: int
    start: int = 0
    tokens: int = 0  # from token `start` on, through all layers of the decoder; 0: the whole prompt


class DecodeState(NamedTuple):
    """The sequences decoded together; everything a row needs, so that the cache is the only other state."""

    token: Int[Array, "B"]  # fed next; its key and value go to slot `length`
    length: Int[Array, "B"]  # tokens in the cache
    response_index: Int[Array, "B"]  # index of the response token that is drawn next
    alive: Bool[Array, "B"]
    rope_delta: Int[Array, "B"]
    end: Int[Array, "B"]  # response tokens allowed
    key: UInt32[Array, "B 2"]  # of the leaf
    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    tau_high: Float[Array, "B"]
    ring: Float[Array, "B W"]  # last entropies, oldest first
    ring_tokens: Int[Array, "B W"]  # and the tokens they belong to


class DecodeOutput(NamedTuple):
    """K tokens of every row; `valid` says which were drawn. The window is the one that ends at the token."""

    token: Int[Array, "K B"]
    log_prob: Float[Array, "K B"]
    entropy: Float[Array, "K B"]
    window_mean: Float[Array, "K B"]
    window_hit: Bool[Array, "K B"]
    valid: Bool[Array, "K B"]


@partial(jax.jit, static_argnums=1)
def leaf_keys(root: Key[Array, ""], count: int) -> UInt32[Array, "G 2"]:
    """Returns the key data of the `count` leaves of a tree. Jitted, as it runs once a prompt."""
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.arange(count)))


_LAYERS = "text.layers."


@partial(jax.jit, static_argnames="by_output")
def _cut(stacked: dict[str, Array], by_output: bool) -> list[dict[str, Array]]:
    count = len(next(iter(stacked.values())))
    if by_output:
        kernels = {name for name in stacked if name.endswith("_kernel")}
        transposed = {f"{name.removesuffix('_kernel')}_by_output": stacked[name].swapaxes(1, 2) for name in kernels}
        stacked = {name: value for name, value in stacked.items() if name not in kernels} | transposed
    return [{name: value[i] for name, value in stacked.items()} for i in range(count)]


def cut_layers(params: Mapping[str, Array]) -> dict[str, Any]:
    """Returns flat parameters with the text decoder's layers as a list: what the programs take on CPUs and GPUs.

    On one CPU kernels are stored output by output, as `linear_by_output` takes them.
    """
    stacked = {name.removeprefix(_LAYERS): value for name, value in params.items() if name.startswith(_LAYERS)}
    others = {name: value for name, value in params.items() if not name.startswith(_LAYERS)}
    devices = next(iter(stacked.values())).devices()
    by_output = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return {**others, _LAYERS: _cut(stacked, by_output)}


def cut_shapes(params: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns what `cut_layers` makes of placed shapes of parameters on GPUs."""
    stacked = {name.removeprefix(_LAYERS): value for name, value in params.items() if name.startswith(_LAYERS)}
    others = {name: value for name, value in params.items() if not name.startswith(_LAYERS)}

    def layer(x):
        sharding = jax.NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    count = next(iter(stacked.values())).shape[0]
    return {**others, _LAYERS: [{name: layer(value) for name, value in stacked.items()} for _ in range(count)]}


def _whole(model: Qwen25VL, params: Mapping[str, Any]) -> tuple[Qwen25VL, list[dict[str, Array]] | None]:
    """Returns the model with parameters that may be cut, and the layers if they are; then the model has none of them."""
    others = {name: value for name, value in params.items() if name != _LAYERS}
    return with_params(model, to_flat(model) | others), params.get(_LAYERS)


class Programs:
    """Compiled per shape; `model` gives the structure, the weights are arguments (flat, or as `cut_layers` gives them)."""

    def __init__(
        self, model: Qwen25VL, *, eos_token_ids: tuple[int, ...], banned: Bool[Array, "V"], trigger: Bool[Array, "V"],
        steps: int, prefill_layers: int, prefill_chunk: int = 0, kernel: str = "", paged_attention: str = "",
    ):  # fmt: skip
        """`prefill_chunk`: tokens of a longer prompt that go through the decoder together, whole pages; 0: all.

        `kernel`: `implementation` of the sampling kernels ("": their own choice); `paged_attention`: see `EngineOptions`.
        """
        c = model.config
        self._chunk, self._layers = prefill_chunk, c.text.num_layers
        self._text_parts = [PrefillChunk(False, *part) for part in _divided(c.text.num_layers, prefill_layers)]
        self._tower_parts = [PrefillChunk(True, *part) for part in _divided(c.vision.num_layers, prefill_layers)]
        self.encode_images = jax.jit(partial(_encode_images, model), static_argnames=("count", "end"))
        static = ("begin", "end", "count", "tokens")
        self.prefill_layers = jax.jit(partial(_prefill_layers, model), static_argnames=static, donate_argnames="kv_pages")
        self.copy_pages = jax.jit(_copy_pages, donate_argnums=0)
        self.read_pages = jax.jit(_read_pages)
        self.write_pages = jax.jit(_write_pages, donate_argnums=0)
        eos = jnp.array(eos_token_ids, jnp.int32)
        fixed = (model, eos, banned, trigger, steps, kernel or None, paged_attention)
        self.decode = jax.jit(partial(_decode, *fixed), donate_argnums=1)

    def parts(self, prompts: Prompts) -> list[PrefillChunk]:
        """Returns the parts that fill the prompts' pages, in order."""
        length, chunk, text = prompts.tokens.shape[1], self._chunk, self._text_parts
        if chunk and length > chunk:
            text = [PrefillChunk(False, 0, self._layers, start, chunk) for start in range(0, length, chunk)]
        return [*(self._tower_parts if prompts.vision else ()), *text]

    def prefill(self, params: Any, kv_pages: Float[Array, "L N S 2K H"], prompts: Prompts) -> Float[Array, "L N S 2K H"]:
        """Runs all parts. Returns the cache."""
        x = None
        for part in self.parts(prompts):
            kv_pages, x = self.prefill_part(params, kv_pages, prompts, x, part)
        return kv_pages

    def prefill_part(
        self,
        params: Any,
        kv_pages: Float[Array, "L N S 2K H"],
        prompts: Prompts,
        x: Float[Array, "B P W"] | None,
        part: PrefillChunk,
    ) -> tuple[Float[Array, "L N S 2K H"], Float[Array, "B P W"] | None]:
        """Runs a part on what the part before gave (the first: on None). Returns the cache and what the next one takes."""
        vision = prompts.vision
        if part.tower:
            assert vision is not None
            end = part == self._tower_parts[-1]
            return kv_pages, self.encode_images(params, x, vision, np.int32(part.first), count=part.layers, end=end)
        prompts, hidden, start = prompts._replace(vision=None), x, np.int32(part.start) if part.tokens else None
        for some in self._text_parts if part.tokens else [part]:
            own = params
            if _LAYERS in params:
                own = {**params, _LAYERS: params[_LAYERS][some.first : some.first + some.layers]}
            kv_pages, hidden = self.prefill_layers(
                own, kv_pages, hidden, prompts, np.int32(some.first), start, begin=some.first == 0,
                end=some.first + some.layers == self._layers, count=some.layers, tokens=part.tokens,
            )  # fmt: skip
        return kv_pages, x if part.tokens else hidden  # the next tokens, too, take what the vision tower gave


def _divided(layers: int, most: int) -> list[tuple[int, int]]:
    """Returns (first, count) of parts of about equal size, at most `most` layers each."""
    parts = -(-layers // most)
    starts = [layers * i // parts for i in range(parts + 1)]
    return [(first, end - first) for first, end in itertools.pairwise(starts)]


@jax.named_scope("prefill")
def _encode_images(
    model: Qwen25VL,
    params: Any,
    x: Float[Array, "B P W"] | None,
    inputs: VisionInputs,
    first: Int[Array, ""],
    *,
    count: int,
    end: bool,
) -> Float[Array, "B P W"]:
    """`end`: returns the features, [B, P / 4, D]."""
    tower = _whole(model, params)[0].visual
    x = tower.run_layers(tower.embed_patches(inputs) if x is None else x, inputs, first, count)
    return tower.merge_patches(x) if end else x


@jax.named_scope("prefill")
def _prefill_layers(
    model: Qwen25VL,
    params: Any,
    kv_pages: Float[Array, "L N S 2K H"],
    x: Float[Array, "B P W"] | None,
    prompts: Prompts,
    first: Int[Array, ""],
    start: Int[Array, ""] | None,
    *,
    begin: bool,
    end: bool,
    count: int,
    tokens: int,
) -> tuple[Float[Array, "L N S 2K H"], Float[Array, "B T D"] | None]:
    """`begin`: x are the features that the vision tower gave, or None for text alone. `start`: of `tokens` from there on.

    `end`: the model's last layer is among them; nothing comes after.
    """
    model, layers = _whole(model, params)
    if begin:
        x = model.embed(prompts.tokens, x, start, tokens)
    x, kv_pages = model.text.prefill(
        x, prompts.positions, prompts.segment_ids, kv_pages, prompts.pages, first, count, layers, start, end
    )  # fmt: skip
    return _placed(kv_pages), x


def _copy_pages(
    kv_pages: Float[Array, "L N S 2K H"], source: Int[Array, "C"], target: Int[Array, "C"]
) -> Float[Array, "L N S 2K H"]:
    return _placed(kv_pages.at[:, target].set(kv_pages[:, source]))


def _read_pages(kv_pages: Float[Array, "L N S 2K H"], pages: Int[Array, "C"]) -> Float[Array, "L C S 2K H"]:
    return kv_pages[:, pages]


def _write_pages(
    kv_pages: Float[Array, "L N S 2K H"], pages: Int[Array, "C"], content: Float[Array, "L C S 2K H"]
) -> Float[Array, "L N S 2K H"]:
    return _placed(kv_pages.at[:, pages].set(content))


def _placed(kv_pages: Float[Array, "L N S 2K H"]) -> Float[Array, "L N S 2K H"]:
    """Keeps the cache split over the mesh in use as it was given, so that it is updated in place."""
    if jax.sharding.get_abstract_mesh().empty:
        return kv_pages
    return jax.lax.with_sharding_constraint(kv_pages, cache_spec(kv_pages.shape[3] // 2))


class _Sampled(NamedTuple):
    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    entropy: Float[Array, "B"]
    ring: Float[Array, "B W"]
    ring_tokens: Int[Array, "B W"]
    window_mean: Float[Array, "B"]
    window_hit: Bool[Array, "B"]


def _sample(
    hidden: Float[Array, "B D"],
    head: Float[Array, "V D"],
    rows: DecodeState,
    banned: Bool[Array, "V"],
    trigger: Bool[Array, "V"],
    kernel: str | None,
) -> _Sampled:
    """Returns the next token of every row, what is known of it, and the window that ends there. On a mesh each device looks
    at its own part of the vocabulary, and a few numbers a row cross."""

    def local(hidden, head, rows, banned, trigger, *, axis=None):
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.response_index)
        token, log_prob, entropy = sample_with_entropy(
            hidden, head, keys, temperature=rows.temperature, top_k=rows.top_k, top_p=rows.top_p, banned=banned,
            implementation=kernel, axis_name=axis,
        )  # fmt: skip
        ring, tokens, mean, hit = window_step(
            WindowRing(rows.ring, rows.response_index), rows.ring_tokens, entropy, token, rows.alive, tau_high=rows.tau_high,
            trigger=trigger, implementation=kernel,
        )  # fmt: skip
        return _Sampled(token, log_prob, entropy, ring.entropies, tokens, mean, hit)

    if jax.sharding.get_abstract_mesh().empty:
        return local(hidden, head, rows, banned, trigger)
    axis = next(iter(mesh_axes("vocab", len(head))), None)
    whole, part = PartitionSpec(), PartitionSpec(axis)
    specs = whole, part, whole, part, whole
    split = jax.shard_map(partial(local, axis=axis), in_specs=specs, out_specs=whole, check_vma=False)
    return split(hidden, head, rows, banned, trigger)


@jax.named_scope("decode")
def _decode(
    model: Qwen25VL,
    eos: Int[Array, "E"],
    banned: Bool[Array, "V"],
    trigger: Bool[Array, "V"],
    steps: int,
    kernel: str | None,
    attention: str,
    params: Any,
    kv_pages: Float[Array, "L N S 2K H"],
    page_table: Int[Array, "B M"],
    rows: DecodeState,
) -> tuple[Float[Array, "L N S 2K H"], DecodeState, DecodeOutput]:
    """Draws up to `steps` tokens for every row that is alive; stops early when none is."""
    model, layers = _whole(model, params)
    head = model.head
    count = rows.token.shape[0]

    def step(carry):
        k, pages, r, out = carry
        hidden, pages = model.decode(r.token, r.length + r.rope_delta, pages, page_table, r.length, layers, attention)
        s = _sample(hidden, head, r, banned, trigger, kernel)
        drawn = DecodeOutput(s.token, s.log_prob, s.entropy, s.window_mean, s.window_hit, r.alive)
        out = jax.tree.map(lambda buffer, value: buffer.at[k].set(value), out, drawn)
        response_index = r.response_index + r.alive
        alive = r.alive & ~(s.token[:, None] == eos).any(axis=1) & (response_index < r.end)
        r = r._replace(
            token=jnp.where(r.alive, s.token, r.token), length=r.length + r.alive, response_index=response_index,
            alive=alive, ring=s.ring, ring_tokens=s.ring_tokens,
        )  # fmt: skip
        return k + 1, pages, r, out

    def going(carry):
        return (carry[0] < steps) & carry[2].alive.any()

    def buffer(dtype):
        return jnp.zeros((steps, count), dtype)

    numbers, flags = buffer(jnp.float32), buffer(bool)
    out = DecodeOutput(buffer(jnp.int32), numbers, numbers, numbers, flags, flags)
    _, kv_pages, rows, out = jax.lax.while_loop(going, step, (jnp.int32(0), kv_pages, rows, out))
    return _placed(kv_pages), rows, out
