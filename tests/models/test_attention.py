"""Attention in blocks, and JAX's splash attention, against the dense one: values, gradients, sharded, and for the TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from ares_jax.models.qwen2_5_vl import attention as attention_file
from ares_jax.models.qwen2_5_vl.attention import (
    attention,
    causal_mask,
    implementation,
    same_group_mask,
    self_attention,
    token_marks,
)
from ares_jax.models.qwen2_5_vl.blockwise import _tiles, blockwise_attention
from ares_jax.models.qwen2_5_vl.splash import splash_attention
from ares_jax.parallel.sharding import make_mesh
from data_pipeline.vision_layout import vision_layout


def heads(length, *, rows=3, heads=4, kv_heads=2, size=8, seed=0):
    """Returns query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.normal(size=(rows, length, n, size)), jnp.float32) for n in (heads, kv_heads, kv_heads, heads)]


def packed(length, kind, *, rows=3, seed=0):
    """Returns ids and leaf spans of random segments with padding behind them; the last row is nothing but padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in ids[:-1]:
        used = rng.integers(1, length + 1)
        row[:used] = np.sort(rng.integers(1, 5, size=used))
    if kind == "groups":  # not in order, as the windows of an image are not
        ids = rng.permuted(ids, axis=1)
    # Any spans: all must read them alike.
    spans = jnp.array(np.sort(rng.integers(0, 4, size=(rows, 2, length)), axis=1), jnp.int32) if kind == "trees" else None
    return jnp.array(ids), spans


@functools.partial(jax.jit, static_argnums=(0, 1))
def pulled(f, kind, operands, ids, spans):
    """Returns output and gradients of an attention, with nothing at padding."""
    *inputs, cotangent = operands
    there = (ids > 0)[..., None, None]
    out, pull = jax.vjp(lambda *x: f(*x, ids, spans, kind != "groups"), *inputs)
    return jnp.where(there, out, 0), pull(jnp.where(there, cotangent, 0))


def dense(query, key, value, ids, spans, causal):
    return attention(query, key, value, causal_mask(ids, spans) if causal else same_group_mask(ids))


def in_blocks(query, key, value, ids, spans, causal):
    marks = token_marks(ids, spans)
    return blockwise_attention(query, key, value, marks, marks, causal=causal, block=16)


def by_splash(query, key, value, ids, spans, causal):
    assert causal
    marks = token_marks(ids, spans)
    only = spans is None
    return splash_attention(query, key, value, marks, marks, segments_only=only, block=128, interpret=True)


def assert_same(mine, expected):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind", ["segments", "trees", "groups"])
def test_blocks_are_the_dense_attention(kind):
    for seed in range(20):
        arguments = kind, heads(61, seed=seed), *packed(61, kind, seed=seed)
        assert_same(pulled(in_blocks, *arguments), pulled(dense, *arguments))


@pytest.mark.parametrize("kind", ["segments", "trees"])
def test_splash_attention_is_the_dense_attention(kind):
    arguments = kind, heads(256, rows=2, heads=2, kv_heads=1, size=128), *packed(256, kind, rows=2, seed=1)
    assert_same(pulled(by_splash, *arguments), pulled(dense, *arguments))


def test_splash_attention_of_some_queries_is_theirs_of_the_whole():
    query, key, value, _ = heads(384, rows=1, heads=2, kv_heads=1, size=128)
    ids = jnp.array(np.repeat([1, 2, 3, 0], [100, 120, 100, 64]))[None]
    marks, some = token_marks(ids, None), slice(128, 256)  # the last keys are no query's
    mine = splash_attention(
        query[:, some], key, value, marks[:, :, some], marks, segments_only=False, block=128, interpret=True
    )
    assert_same(mine, dense(query, key, value, ids, None, True)[:, some])


def test_tiles_in_which_nobody_sees_anybody_are_not_computed():
    query, key, value, _ = heads(64, rows=1)
    ids = jnp.repeat(jnp.arange(1, 5), 16)[None]
    spans = jnp.zeros((1, 2, 64), jnp.int32).at[:, :, 8:16].set(1)  # two branches in the first segment
    other = jnp.ones(64, bool).at[8:16].set(False)
    spoilt = jnp.where(other[:, None, None], jnp.nan, value)  # would spread through any product, even with weight 0
    marks = token_marks(ids, spans)
    out = blockwise_attention(query, key, spoilt, marks, marks, causal=True, block=8)
    assert jnp.isfinite(out[0, 8:16]).all() and jnp.isnan(out[0, :8]).all()


def test_windows_of_an_image_leave_most_tiles_out():
    layout = vision_layout(np.array([[1, 64, 64], [1, 32, 96]]))
    marks = token_marks(jnp.array(layout.window_ids)[None], None)[0].reshape(4, -1, 512).swapaxes(0, 1)
    needed = _tiles(marks, marks, False).needed
    assert needed.shape == (14, 14) and needed.sum() == 22


@pytest.mark.parametrize(
    "kind, sizes, counts, longest_dense",
    [
        ("segments", {"fsdp": 2, "sequence": 4}, (4, 2), 16),  # queries split, keys gathered
        ("trees", {"fsdp": 2, "sequence": 2, "tensor": 2}, (4, 2), 16),  # heads, too
        ("trees", {"fsdp": 2, "tensor": 4}, (4, 2), 16),  # two key/value heads, four parts: a copy each
        ("groups", {"data": 1, "fsdp": 1, "tensor": 8}, (4, 2), 16),  # four heads, eight parts: queries are split instead
        ("segments", {"fsdp": 1, "tensor": 8}, (28, 4), 16),  # 7B's heads: neither queries' nor a copy of each divides
        ("segments", {"fsdp": 1, "tensor": 8}, (28, 4), 1024),  # the same, rows whole
        ("trees", {"fsdp": 2, "tensor": 4}, (28, 4), 16),
    ],
)
def test_on_a_mesh_it_is_the_same(kind, sizes, counts, longest_dense, monkeypatch):
    monkeypatch.setattr(attention_file, "LONGEST_DENSE", longest_dense)
    arguments = kind, heads(24, rows=4, heads=counts[0], kv_heads=counts[1]), *packed(24, kind, rows=4)

    def switched(query, key, value, ids, spans, causal):
        return self_attention(query, key, value, ids, spans, causal=causal)

    with jax.set_mesh(make_mesh(**sizes)):
        mine = pulled(switched, *arguments)
    assert_same(mine, pulled(dense, *arguments))


@pytest.mark.parametrize("kind", ["segments", "trees", "groups"])
def test_the_gpus_attention_has_the_same_mask_layout_and_scale(kind, monkeypatch):
    """cuDNN's arguments, in the hands of the same function's XLA implementation."""
    calls, real = [], jax.nn.dot_product_attention

    def stand_in(*operands, implementation, **options):
        calls.append(implementation)
        return real(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention_file, "platform", lambda: "gpu")

    def switched(query, key, value, ids, spans, causal):
        return self_attention(query, key, value, ids, spans, causal=causal)

    operands = [x.astype(jnp.bfloat16) for x in heads(62, heads=6, seed=3)]
    ids, spans = packed(62, kind, seed=3)
    mine = pulled(switched, kind, operands, ids, spans)
    assert calls == ["cudnn"]
    exact = pulled(dense, kind, [x.astype(jnp.float32) for x in operands], ids, spans)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.01 * np.abs(b).max())


def test_each_platform_has_its_attention():
    half, wide = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert implementation("cpu", wide, 1024, 64, causal=True) == "dense"
    assert implementation("cpu", half, 4096, 128, causal=True) == "blockwise"
    assert implementation("tpu", half, 4096, 128, causal=True) == "splash"
    assert implementation("tpu", half, 4096, 128, causal=True, queries=256) == "blockwise"  # 256 queries a device
    assert implementation("tpu", half, 4096, 80, causal=False) == "blockwise"  # the vision tower
    assert implementation("gpu", half, 4096, 128, causal=True) == "cudnn"
    assert implementation("gpu", half, 4096, 80, causal=False) == "cudnn"
    assert implementation("gpu", wide, 4096, 128, causal=True) == "blockwise"
    assert implementation("gpu", half, 32_768, 128, causal=True) == "blockwise"


@pytest.mark.parametrize("tree, sizes", [(False, {"fsdp": 4}), (True, {"fsdp": 2, "sequence": 2})])
def test_the_tpu_compiler_takes_a_row_of_32k_tokens(tree, sizes):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh(devices=devices, **sizes)
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))

    def shape(*dimensions, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((sizes["fsdp"], *dimensions), dtype, sharding=rows)

    length = 32_768
    ids, spans = shape(length, dtype=jnp.int32), shape(2, length, dtype=jnp.int32) if tree else None

    def gradient(query, key, value, ids, spans):
        return jax.grad(lambda *x: self_attention(*x, ids, spans, causal=True).astype(jnp.float32).sum(), (0, 1, 2))(
            query, key, value
        )

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradient).lower(shape(length, 28, 128), shape(length, 4, 128), shape(length, 4, 128), ids, spans)
        compiled = lowered.compile()
    assert "tpu_custom_call" in lowered.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 2**30  # the scores alone would be 56 GiB
