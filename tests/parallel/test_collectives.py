"""On 8 virtual devices: what each holds, in bytes, and what the learner's compiled programs gather and sum."""

import functools
import math
import re

import jax
import pytest

from ares_jax.aepo.learner import Learner
from ares_jax.parallel.sharding import make_mesh, place_model
from ares_jax.params import to_flat
from ares_jax.planning import aot
from ares_jax.training import abstract_state, initial_state, make_optimizer
from configs.digits_cpu import get_config
from data_pipeline.micro_batch import AEPO_FIELDS, TREE_FIELDS
from tests import digits

BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2}
# Activations are far larger than the parameters; 3, 6 or 12 rows a device, 72 patches: none has the shape of a parameter.
ROWS = {"rows": 24, "row_tokens": 512, "row_patches": 72}
MESHES = {
    "one": {"fsdp": 1}, "fsdp": {"fsdp": 8}, "sequence": {"fsdp": 2, "sequence": 4}, "tensor": {"fsdp": 2, "tensor": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}  # fmt: skip
# The programs of an AEPO update; `more` is `first` and a sum.
PROGRAMS = [("fsdp", "more"), ("sequence", "more"), ("tensor", "more"), ("mixed", "first"), ("mixed", "apply"),
            ("mixed", "log_probs")]  # fmt: skip


@functools.cache
def learner(mesh):
    """Returns the shapes of the state and of a batch, and what lowers the programs, on a mesh of `MESHES`."""
    config, axes = get_config(), MESHES[mesh]
    config.packing.update(ROWS)
    place = place_model(digits.model(), make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())]))
    optimizer = make_optimizer(config.optimizer, learning_rate=1e-3, steps=2, warmup_steps=0)
    made = Learner(digits.model(), digits.banned(), optimizer, config.aepo, place, temperature=1.0)
    batch = aot.batch_shapes(config, place, (*AEPO_FIELDS, *TREE_FIELDS, "reference_log_prob"))
    state = abstract_state(to_flat(digits.model()), optimizer, place)
    return state, batch, made.lower(state, batch)


@functools.cache
def compiled(mesh, name):
    return learner(mesh)[2][name]().compile()


def results(program, kind):
    """The results of each collective of a kind in a program's text, as lists of (type, shape)."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", program.as_text())
    return [
        [(t, tuple(int(size) for size in dims.split(",") if size)) for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
        for shapes in found
    ]


def size(arrays):
    return sum(math.prod(shape) * BYTES[kind] for kind, shape in arrays)


def whole(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_parameters_and_moments_are_split():
    """Two devices of eight hold the same quarter; what has an axis that no mesh axis splits is the rest."""
    place = place_model(digits.model(), make_mesh(**MESHES["mixed"]))
    optimizer = make_optimizer(get_config().optimizer, learning_rate=1e-3, steps=2, warmup_steps=0)
    state = initial_state(place.put(to_flat(digits.model())), optimizer, place)
    for tree in (state.params, state.optimizer):
        leaves = jax.tree.leaves(tree)
        every = sum(leaf.nbytes for leaf in leaves)
        for device in jax.devices():
            held = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
            assert every / 4 <= held < every / 3


@pytest.mark.parametrize("mesh", ["fsdp", "sequence", "tensor"])
def test_activations_are_split(mesh):
    """Scratch of the gradients' program, far more than the parameters: on eight devices an eighth each, and some weights."""
    one, split = (compiled(name, "more").memory_analysis().temp_size_in_bytes for name in ("one", mesh))
    assert one > 100 * whole(learner("one")[0].params)
    assert split < one / 5


@pytest.mark.parametrize("mesh, name", PROGRAMS)
def test_the_arguments_of_a_device_are_its_share(mesh, name):
    """What a program reads from memory before it works: its share of the parameters, and its rows of the batch."""
    state, batch, _ = learner(mesh)
    trees = {"first": 1, "log_probs": 1, "more": 2, "apply": 4}[name]  # parameters, gradients, moments
    axes = MESHES[mesh]
    share = 1 / (8 // axes.get("data", 1)) + 0.1  # what has an axis that the mesh does not divide
    rows = 0 if name == "apply" else whole(batch) / (axes.get("data", 1) * axes["fsdp"])
    assert compiled(mesh, name).memory_analysis().argument_size_in_bytes < trees * share * whole(state.params) + rows


def parameters_in(collectives, params):
    """The bytes of whole parameters, of a layer or of all, in each collective: activations have other shapes."""
    shapes = {value.shape for value in params.values()}
    shapes |= {value.shape[1:] for name, value in params.items() if ".layers." in name}
    return [size((kind, shape) for kind, shape in arrays if shape in shapes) for arrays in collectives]


@pytest.mark.parametrize("mesh, name", PROGRAMS)
def test_no_program_gathers_the_tree(mesh, name):
    """A parameter may be whole for as long as its layer works; a stack of layers, or the tree, never is."""
    params, program = learner(mesh)[0].params, compiled(mesh, name)
    stacks = {value.shape for key, value in params.items() if ".layers." in key and value.ndim > 2}
    gathers = results(program, "all-gather")
    assert any(parameters_in(gathers, params)) == (name != "apply"), "AdamW works where the state lies"
    assert not stacks & {shape for gather in gathers for _, shape in gather}
    assert max(parameters_in(gathers, params), default=0) < whole(params) / 2


@pytest.mark.parametrize("mesh, name", PROGRAMS)
def test_the_tree_is_summed_at_most_once(mesh, name):
    """The gradients', in one: on a CPU whole, as it joins sums and knows no reduce-scatter; test_aot.py has the TPU's."""
    params, program = learner(mesh)[0].params, compiled(mesh, name)
    sums = results(program, "all-reduce")  # with `sequence` some parameters over one axis after the other
    assert sum(parameters_in(sums, params)) <= (name in ("first", "more")) * 1.2 * whole(params)
    if name == "apply":
        assert sum(map(size, sums)) < 1024  # the gradients' norm
