"""On 8 virtual devices: parameters are really split, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ares_jax.cold_start.sft import example
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel import distributed
from ares_jax.parallel.sharding import RULES, make_mesh, param_shardings, place_model
from ares_jax.params import logical_axes, to_flat
from ares_jax.training import Update, initial_state
from ares_jax.training.log_probs import token_statistics
from data_pipeline.packing import pack
from tests import digits


def after(mesh):
    """Returns the state and metrics after one update, gradients, moments and weights, from two micro-batches."""
    segments = [example(p, np.arange(20, 30, dtype=np.int32)) for p in digits.prompts(16)]
    batches = pack(segments, row_tokens=64, row_patches=48, rows=8)
    assert len(batches) == 2
    statistics = token_statistics(digits.model(), jnp.zeros(digits.VOCABULARY, bool))

    def loss(params, batch):
        return -jnp.sum(batch["weight"] * statistics(params, batch)[0]) / 160, {}

    place = place_model(digits.model(), mesh)
    params = {name: value.copy() for name, value in place.put(to_flat(digits.model())).items()}
    optimizer = optax.chain(optax.trace(0.9), optax.sgd(1.0))  # momentum: moments without Adam's signs
    return Update(loss, optimizer, place)(initial_state(params, optimizer, place), batches)


@pytest.fixture(scope="module")
def alone():
    return after(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 4},
        {"fsdp": 1, "tensor": 8},  # four query and two key/value heads
    ],
)
def test_the_sharded_update_is_the_single_device_one(sizes, alone):
    state, metrics = after(make_mesh(**sizes))
    expected, reference = alone
    np.testing.assert_allclose(metrics["grad_norm"], reference["grad_norm"], rtol=1e-5)
    for mine, single in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, single, atol=1e-5)
    for tree in (state.params, state.optimizer):  # every device holds its part of each and no more
        leaves = jax.tree.leaves(tree)
        assert sum(x.addressable_shards[0].data.nbytes for x in leaves) < 0.6 * sum(x.nbytes for x in leaves)


def test_every_axis_of_every_parameter_has_a_rule():
    model = abstract_model(PUBLISHED["7b"])
    for name, axes in logical_axes(model).items():
        assert set(axes) <= set(RULES), name
    split = param_shardings(model, make_mesh(fsdp=2, sequence=2, tensor=2))
    assert split["text.layers.q_kernel"].spec == jax.P(None, ("fsdp", "sequence"), ("tensor",))
    assert split["lm_head"].spec == jax.P(("tensor",), ("fsdp", "sequence"))
    assert split["text.layers.norm1"].spec == jax.P(None, ("fsdp", "sequence"))


def test_rows_that_cannot_be_split_are_refused_with_the_remedy():
    place = place_model(digits.model(), make_mesh(data=2, fsdp=4))
    with pytest.raises(UserError, match="rows=12 cannot be split over mesh data x fsdp = 8; make it a multiple of 8"):
        place.put_batch({"tokens": np.zeros((12, 3))})


def test_a_mesh_must_fill_the_devices():
    with pytest.raises(UserError, match="mesh data=3 fsdp=1 sequence=1 tensor=1 does not fill 8 devices"):
        make_mesh(data=3, fsdp=1)


@pytest.mark.parametrize(
    "spec, target, piece",
    [
        ((None, "tensor", "fsdp"), (None, "tensor", None), (2, 6, 8)),  # two layers of seven
        (("tensor", None, "fsdp"), (None, None, "tensor"), (8, 1, 8)),  # one of six
        (("tensor", "sequence", "fsdp"), ("tensor", None, None), (8, 6, 8)),  # nothing is left to cut
        ((None, None, None), (None, "tensor", None), (8, 6, 8)),  # whole anyway
    ],
)  # fmt: skip
def test_an_array_is_handed_over_in_pieces(monkeypatch, spec, target, piece):
    """Of all axes the first one that is not split is cut: no device ever has more of it whole."""
    monkeypatch.setattr(distributed, "_PIECE", 6 * 8 * 4 * 2)
    shape = (7 if spec[0] is None else 8, 6, 8)
    piece = (min(piece[0], shape[0]), *piece[1:])
    expected = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    value = jax.device_put(expected, jax.NamedSharding(make_mesh(fsdp=2, sequence=2, tensor=2), jax.P(*spec)))
    there = make_mesh(tensor=2, devices=jax.devices()[:2])
    made, cut = [], distributed._cut
    monkeypatch.setattr(distributed, "_cut", lambda *a, **k: made.append(cut(*a, **k)) or made[-1])
    handed = distributed.local_parts(value, jax.NamedSharding(there, jax.P(*target)))
    np.testing.assert_array_equal(handed, expected)
    assert handed.sharding == jax.NamedSharding(there, jax.P(*target))
    whole = np.zeros(shape, np.float32)
    for start, part in distributed._pieces(value):
        assert part.sharding.is_fully_replicated
        whole[tuple(slice(i, i + size) for i, size in zip(start, part.shape, strict=True))] = part
    np.testing.assert_array_equal(whole, expected)
    assert {part.shape for part in made} == (set() if value.sharding.is_fully_replicated else {piece})
    if made:  # the program that cuts gathers the piece, not what it is cut from
        program = cut.lower(value, (0, 0, 0), shape=piece, sharding=value.sharding).compile()
        assert program.memory_analysis().temp_size_in_bytes <= 2 * 4 * np.prod(piece)
    handed.addressable_shards[0].data.delete()  # a copy: the learner's is still there
    np.testing.assert_array_equal(value, expected)
