"""LoRA: what the model computes without merging is what the merged model computes, and so are the gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.errors import UserError
from ares_jax.models.lora import PROJECTIONS, Lora, is_lora, merge_kernel, merged
from ares_jax.models.qwen2_5_vl.model import abstract_model, new_lora
from ares_jax.params import to_flat, with_params
from tests import digits

LORA = Lora(rank=3, alpha=7.0)
INPUTS = (
    np.random.default_rng(0).integers(0, 300, (2, 8)), np.broadcast_to(np.arange(8), (2, 3, 8)), np.ones((2, 8), int)
)  # fmt: skip


@functools.cache
def plain():
    return digits.model()


@functools.cache
def adapted():
    return abstract_model(plain().config, lora=LORA)


def fresh():
    return to_flat(plain()) | new_lora(plain().config, 0, LORA)


def trained():
    """Returns parameters of which no factor is 0."""
    keys = iter(jax.random.split(jax.random.key(1), 20))
    return {
        name: 0.2 * jax.random.normal(next(keys), value.shape) if name.endswith("_lora_b") else value
        for name, value in fresh().items()
    }


def outputs(model):
    """Returns hidden states and caches by every way through the decoder."""
    text, (tokens, positions, ones) = model.config.text, INPUTS
    pages = jnp.ones((text.num_layers, 3, 4, 2 * text.num_kv_heads, text.head_dim))
    decoded = model.decode(tokens[:, 0], np.array([2, 3]), pages, np.array([[1], [2]]), np.array([2, 3]))
    empty, table = jnp.zeros((text.num_layers, 4, 4, *pages.shape[3:])), np.arange(4).reshape(2, 2)
    filled = model.text.prefill(model.embed(tokens, None), positions, ones, empty, table, 0, text.num_layers)
    return model(tokens, positions, ones), filled, decoded


def run(model, params):
    return jax.tree.leaves(jax.jit(lambda flat: outputs(with_params(model, flat)))(params))


def test_the_merged_model_computes_the_same():
    found, expected = run(adapted(), trained()), run(plain(), dict(merged(trained(), LORA)))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)
    assert float(jnp.abs(found[0] - run(plain(), to_flat(plain()))[0]).max()) > 0.5  # and not what it was without


def test_fresh_factors_change_nothing():
    for mine, other in zip(run(adapted(), fresh()), run(plain(), to_flat(plain())), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    for name, value in merged(fresh(), LORA):
        np.testing.assert_array_equal(value, to_flat(plain())[name])
    assert {n for n in fresh() if is_lora(n)} == {f"text.layers.{p}_lora_{x}" for p in PROJECTIONS for x in "ab"}
    for name, value in fresh().items():
        if name.endswith("_lora_a"):
            assert value.shape[2] == 3 and float(value.std()) == pytest.approx(value.shape[1] ** -0.5, rel=0.2)


def test_gradients_are_those_of_the_merged_formulation():
    """Also by hand: from the gradient D of a kernel, a's is `scale D b^T` and b's `scale a^T D`."""
    weights = [np.random.default_rng(1).normal(size=x.shape) for x in run(adapted(), trained())]
    params = trained()
    own = {name: value for name, value in params.items() if is_lora(name)}

    def loss(model, flat):
        return sum(jnp.sum(w * x) for w, x in zip(weights, jax.tree.leaves(outputs(with_params(model, flat))), strict=True))

    grads = jax.jit(jax.grad(lambda lora: loss(adapted(), params | lora)))(own)
    through = jax.jit(jax.grad(lambda lora: loss(plain(), dict(merged(params | lora, LORA)))))(own)
    kernels = jax.jit(jax.grad(lambda flat: loss(plain(), flat)))(dict(merged(params, LORA)))
    for name, value in grads.items():
        stem, factor = name.rsplit("_lora_", 1)
        d = np.asarray(kernels[f"{stem}_kernel"], np.float64)
        a, b = (np.asarray(params[f"{stem}_lora_{x}"], np.float64) for x in "ab")
        by_hand = LORA.scale * (d @ b.swapaxes(1, 2) if factor == "a" else a.swapaxes(1, 2) @ d)
        scale = np.abs(by_hand).max()
        assert scale > 0.1
        np.testing.assert_allclose(value, by_hand, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(value, through[name], atol=1e-4 * scale, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.integers(0, 99))
def test_merging_rounds_once(rank, dtype, on_device, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 6, rank)).astype(np.float32), rng.normal(size=(2, rank, 4)).astype(np.float32)
    kernel = rng.normal(size=(2, 6, 4)).astype(jnp.dtype(dtype))
    expected = kernel.astype(np.float64) + 0.7 * a.astype(np.float64) @ b.astype(np.float64)
    arrays = [jnp.asarray(x) if on_device else x for x in (kernel, a, b)]
    found = merge_kernel(*arrays, 0.7)
    assert found.dtype == kernel.dtype
    error = np.abs(np.asarray(found, np.float64) - expected)
    ulp = 2.0 ** (-8 if dtype == "bfloat16" else -22)
    assert (error <= ulp * np.abs(expected) + 2e-6).all()


def test_factors_are_float32_whatever_the_model_is_stored_in():
    half = abstract_model(plain().config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, lora=LORA)
    assert all((v.dtype == jnp.float32) == is_lora(name) for name, v in to_flat(half).items())
    params = {name: value.astype(to_flat(half)[name].dtype) for name, value in trained().items()}
    hidden = with_params(half, params)(*INPUTS)
    assert hidden.dtype == jnp.bfloat16
    exact = with_params(plain(), dict(merged(trained(), LORA)))(*INPUTS)
    assert float(jnp.sqrt(jnp.mean((hidden - exact) ** 2))) < 0.1 * float(jnp.std(exact))


@pytest.mark.parametrize("rank, alpha", [(-1, 1.0), (4, 0.0)])
def test_a_rank_or_alpha_that_makes_no_sense_is_refused(rank, alpha):
    with pytest.raises(UserError, match=f"lora.rank={rank}, lora.alpha={alpha}: both must be positive"):
        Lora(rank, alpha)
