"""Attention over pages: both kernels (in the interpreter) and the gather against float64, and the compilers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import paged, paged_gpu
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.paged import gathered_attention, paged_implementation, ragged_attention
from ares_jax.planning import aot
from configs import qwen2_5_vl
from tests.xla import slow

LENGTHS = np.array([1, 37, 8, 40, 9, 1], np.int32)  # of five pages of 8 slots; the last row is no sequence
LAYER = 1


def cached(kv_heads, dtype, seed=0):
    """Returns query heads' worth of random pages with large numbers wherever no row may look, and tables into them."""
    rng = np.random.default_rng(seed)
    kv = rng.normal(size=(3, 24, 8, 2 * kv_heads, 128))
    table = np.zeros((6, 5), np.int32)
    free = iter(rng.permutation(np.arange(1, 24)))
    for row, length in enumerate(LENGTHS[:-1]):
        used = -(-length // 8)
        table[row, :used] = [next(free) for _ in range(used)]
        kv[LAYER, table[row, used - 1], (length - 1) % 8 + 1 :] = 1e4
    table[3, :4] = table[1, :4]  # a prefix shared by two rows
    kv[LAYER, 0, 1:] = 1e4  # the rest of the trash
    kv[LAYER, list(free)] = 1e4
    kv[[0, 2]] = 1e4
    return jnp.asarray(kv, dtype), jnp.asarray(table)


def by_float64(query, kv_pages, table):
    query, pages = np.asarray(query, np.float64), np.asarray(kv_pages[LAYER], np.float64)
    out = np.zeros_like(query)
    for row, length in enumerate(LENGTHS):
        kv = pages[np.asarray(table[row])].reshape(-1, *pages.shape[2:])[:length]
        for n in range(query.shape[1]):
            k = n // (query.shape[1] // (kv.shape[1] // 2))
            scores = kv[:, 2 * k] @ query[row, n] / np.sqrt(128)
            weights = np.exp(scores - scores.max())
            out[row, n] = weights / weights.sum() @ kv[:, 2 * k + 1]
    return out


@pytest.fixture
def interpreter(monkeypatch):
    """Runs Pallas kernels in the plain interpreter: the TPU's own knows no reshaped references in jax 0.10."""
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)  # which it asks an index in the kernel for


# The heads of 3B and 7B.
@pytest.mark.parametrize("heads, kv_heads, dtype, tolerance", [(16, 2, "float32", 1e-5), (28, 4, "bfloat16", 0.02)])
def test_kernel_and_gather_are_the_float64_attention(heads, kv_heads, dtype, tolerance, interpreter, monkeypatch):
    monkeypatch.setattr(paged, "TABLE_BYTES", 4 * 128 * 4)  # four rows in one call of the kernel, two in another
    monkeypatch.setattr(paged, "BLOCK_PAGES", 2)  # a page is missing from the last block
    kv_pages, table = cached(kv_heads, dtype)
    query = jnp.asarray(np.random.default_rng(1).normal(size=(6, heads, 128)), dtype)
    expected = by_float64(query, kv_pages, table)
    arguments = query, kv_pages, jnp.int32(LAYER), table, jnp.asarray(LENGTHS)
    np.testing.assert_allclose(np.asarray(gathered_attention(*arguments), float), expected, atol=tolerance)
    mine = jax.jit(ragged_attention)(*arguments)
    np.testing.assert_allclose(np.asarray(mine, float), expected, atol=tolerance)
    monkeypatch.setattr(paged_gpu, "TOKENS", 16)  # a block has two pages; the last one of a row's five only one
    monkeypatch.setattr(paged_gpu, "SHARES", 2)
    mine = paged_gpu.attend_pages(*arguments, interpret=True)
    np.testing.assert_allclose(np.asarray(mine, float), expected, atol=tolerance)


def test_only_what_the_kernel_takes_is_given_to_it():
    half, wide = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    for shape in PUBLISHED.values():
        assert paged_implementation("tpu", half, shape.text.num_kv_heads, shape.text.head_dim) == "ragged"
    assert paged_implementation("tpu", wide, 4, 128) == "ragged"
    assert paged_implementation("tpu", half, 3, 128) == "gather"  # six heads are no whole tile
    assert paged_implementation("tpu", half, 4, 64) == "gather"
    assert paged_implementation("gpu", half, 4, 128) == paged_implementation("cpu", wide, 4, 128) == "gather"
    assert paged_implementation("gpu", half, 4, 128, "triton") == "triton"
    assert paged_implementation("tpu", half, 4, 128, "gather") == "gather"
    for on, size, wanted, possible in (
        ("cpu", 128, "ragged", "'gather'$"), ("gpu", 80, "triton", "'gather'$"),
        ("gpu", 128, "ragged", "'gather' or 'triton'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"sampler.paged_attention='{wanted}'.*{possible}"):
            paged_implementation(on, half, 4, size, wanted)


@pytest.mark.parametrize("heads, kv_heads, dtype", [(16, 2, "float32"), (28, 4, "bfloat16")])
def test_the_gpu_kernel_lowers_to_triton_and_copies_nothing_of_the_cache(heads, kv_heads, dtype):
    of = jax.ShapeDtypeStruct
    cache = of((28, 8192, 64, 2 * kv_heads, 128), dtype)
    whole = of((), jnp.int32), of((64, 320), jnp.int32), of((64,), jnp.int32)
    lowered = jax.jit(paged_gpu.attend_pages).trace(of((64, heads, 128), dtype), cache, *whole)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text
    made = (line.split("->")[-1] for line in text.splitlines() if "stablehlo." in line)
    assert not any("28x8192x64" in result for result in made)


@pytest.mark.parametrize(
    "size, topology",
    [("3b", "v5e:2x2"), ("7b", "v5p:2x2x1"), slow("3b", "v4:2x2x1"), slow("3b", "v5p:2x2x1"), slow("7b", "v6e:2x2")],
)
def test_a_decode_step_on_a_tpu_copies_nothing_of_the_cache(size, topology):
    config, shape = qwen2_5_vl.aepo(size), PUBLISHED[size]
    config.model.param_dtype = "bfloat16"
    config.sampler.kernel = "tpu"  # or the sampler's logits would be the most of what is temporary
    shape = dataclasses.replace(shape, text=dataclasses.replace(shape.text, num_layers=2))  # they are scanned
    program = aot.sampler_programs(config, shape, aot.topology_devices(topology), ("decode",))["decode"]
    assert not program.refused and "ragged_paged_attention" in program.text
    assert program.temporary < program.resident["KV pages"] / 6  # a third of a layer; a gather would copy it all
