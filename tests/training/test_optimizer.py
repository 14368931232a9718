"""bfloat16 parameters: the optimizer's float32 copies hold what rounding would lose; float32 ones have no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ares_jax.config import default_config
from ares_jax.parallel.sharding import Placement, make_mesh
from ares_jax.training import Update, abstract_state, initial_state, make_optimizer

MESH = make_mesh(devices=jax.devices()[:2])
SPLIT, WHOLE = NamedSharding(MESH, PartitionSpec("fsdp")), NamedSharding(MESH, PartitionSpec())
PLACE = Placement(MESH, {"w": SPLIT, "wide": WHOLE})
CONSTANT = default_config().optimizer
CONSTANT.update(b1=0.0, b2=0.0, weight_decay=0.0, clip_norm=9.0)


def adamw(**changes):
    options = default_config().optimizer
    options.update(changes)
    return make_optimizer(options, learning_rate=1e-4, steps=100)


def steps(optimizer, params, count):
    state = optimizer.init(params)
    for i in range(count):
        grads = {name: jnp.sin(i + jnp.arange(value.size)).reshape(value.shape) + 0.5 for name, value in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_bfloat16_parameters_follow_their_float32_copies(mu_dtype):
    start = jax.random.normal(jax.random.key(0), (8, 4)).astype(jnp.bfloat16)
    found, (masters, inner) = steps(adamw(mu_dtype=mu_dtype), {"w": start, "wide": jnp.ones(3)}, 30)
    expected, moments = steps(adamw(mu_dtype=mu_dtype), {"w": start.astype(jnp.float32), "wide": jnp.ones(3)}, 30)
    assert set(masters) == {"w"} and found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(masters["w"], expected["w"])  # all steps of 1e-4, though bfloat16 has none so small
    np.testing.assert_array_equal(found["w"], expected["w"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(found["wide"], expected["wide"])
    assert (found["w"] != start).any()
    for mine, other in zip(jax.tree.leaves(inner), jax.tree.leaves(moments), strict=True):
        assert mine.dtype == other.dtype
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(inner) if leaf.ndim} == {"float32", mu_dtype}


def test_float32_parameters_have_no_copies():
    params = {"w": jnp.ones((2, 3))}
    assert sum(leaf.size for leaf in jax.tree.leaves(adamw().init(params)) if leaf.ndim) == 12  # two moments


def test_gradients_add_up_in_float32_and_copies_lie_where_the_parameters_do():
    """600 micro-batches with a gradient of 1: in bfloat16 the sum would stay at 256."""
    params = {"w": jnp.zeros(2, jnp.bfloat16), "wide": jnp.zeros(())}
    optimizer = adamw()
    masters, _ = abstract_state(params, optimizer, PLACE).optimizer
    assert masters["w"].sharding == SPLIT and masters["w"].dtype == jnp.float32
    update = Update(lambda p, batch: (p["w"][0].astype(jnp.float32) * batch["one"].mean(), {}), optimizer, PLACE)
    state, metrics = update(initial_state(PLACE.put(params), optimizer, PLACE), [{"one": np.ones(2, np.float32)}] * 600)
    assert float(metrics["grad_norm"]) == 600
    np.testing.assert_array_equal(state.params["w"], state.optimizer[0]["w"].astype(jnp.bfloat16))


def test_the_learning_rate_rises_stays_or_falls_as_told():
    """By sign: Adam's first steps on a constant gradient are the learning rate itself."""

    def rates(count=12, **options):
        optimizer = make_optimizer(CONSTANT, learning_rate=0.5, **options)
        state, found = optimizer.init({"w": jnp.zeros(())}), []
        for _ in range(count):
            updates, state = optimizer.update({"w": jnp.ones(())}, state, {"w": jnp.zeros(())})
            found.append(-float(updates["w"]))
        return found

    np.testing.assert_allclose(rates(steps=10), 0.5, rtol=1e-4)
    found = rates(steps=10, warmup_steps=4, final_fraction=0.1)
    falling = [0.5 * (0.55 + 0.45 * np.cos(np.pi * min(t, 6) / 6)) for t in range(8)]
    np.testing.assert_allclose(found, [0, 0.125, 0.25, 0.375, *falling], rtol=1e-4, atol=1e-7)


def test_a_step_is_adamws_on_the_clipped_gradient_and_only_matrices_decay():
    """One step by hand: the gradient, of norm 10, is scaled to 1; Adam's first step is its sign; matrices lose a share."""
    options = default_config().optimizer
    names = {
        "text.layers.gate_kernel": (2, 3, 2), "text.layers.q_bias": (2, 3), "visual.layers.norm1": (2, 3),
        "text.norm": (3,), "text.embedding": (4, 3), "visual.merger_in_bias": (5,),
    }  # fmt: skip
    params = {name: np.full(shape, 2.0, np.float32) for name, shape in names.items()}
    grads = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    for grad in grads.values():
        grad.flat[0] = 10 / len(names) ** 0.5
    optimizer = make_optimizer(options, learning_rate=0.1, steps=5)
    updates, state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    for name, shape in names.items():
        moment = state[1][0].mu[name]
        assert float(moment.max()) == pytest.approx(0.1 / len(names) ** 0.5, rel=1e-4)  # (1 - b1) x the clipped gradient
        decay = 0.1 * 0.01 * 2.0 if name in ("text.layers.gate_kernel", "text.embedding") else 0.0
        expected = np.full(shape, -decay)
        expected[(0,) * len(shape)] -= 0.1
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-8, err_msg=name)
