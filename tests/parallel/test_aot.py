"""The real programs through the TPU's compiler: they compile, fit, and are given the shapes that the trainers give."""

import dataclasses
import functools
import importlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.aepo.batch import learner_segments
from ares_jax.aepo.state import initial_state
from ares_jax.cold_start.sft import example
from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.models.flops import gradient_flops
from ares_jax.models.qwen2_5_vl.attention import self_attention
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.chips import TPUS
from ares_jax.parallel.micro_batch import check_rows
from ares_jax.parallel.sharding import batch_sharding, make_mesh
from ares_jax.params import count_parameters, to_flat
from ares_jax.planning import aot
from ares_jax.planning.fit import colocated, table
from ares_jax.planning.hlo import Work
from ares_jax.planning.rooflines import kernel_flops, row_flops
from ares_jax.planning.search import candidates, search
from ares_jax.planning.slices import on_slice, overrides
from ares_jax.sampling.requests import rollout_request
from configs import qwen2_5_vl
from data_pipeline.micro_batch import AEPO_FIELDS, SFT_FIELDS, TREE_FIELDS
from data_pipeline.packing import pack
from tests import digits
from tests.xla import EVERYTHING, slow

GIB = 2**30


def planned(size):
    """Returns the AEPO config for a slice of four chips, with short rows: for the compiler, not for a run."""
    c = qwen2_5_vl.aepo(size)
    c.mesh.update(fsdp=2, tensor=2)
    c.packing.update(rows=2, row_tokens=8192, row_patches=4096)
    c.sampler.update(slots=16, prefill_batch=1, pages=512, max_response_tokens=4096)
    return c


@pytest.fixture(scope="module")
def devices():
    return aot.topology_devices("v5p:2x2x1")


# Machine code is made of the programs' kernels only: of a whole step it takes minutes. `python -m ares_jax.plan` does it.
# Up to it the compiler does everything for the gradients of every stage, at the paper's sizes.
@pytest.fixture(scope="module")
def steps():
    """Returns how to wait for a program of a stage: two are compiled at once, each by a process of its own."""
    with ThreadPoolExecutor(2) as pool:
        waiting = {
            (size, stage, name): pool.submit(
                aot.without_code, paper_config(size, stage), PUBLISHED[size], "v5p:2x2x2", stage, name
            )
            for size, stage, name in [
                *((*case, "more") for case in (SHIPPED if EVERYTHING else SHIPPED[:2])),
                ("7b", "aepo", "log_probs"), ("7b", "aepo", "apply"),
            ]
        }  # fmt: skip
        yield {name: future.result for name, future in waiting.items()}


SHIPPED = [("3b", "cold_start"), ("7b", "aepo"), ("3b", "aepo"), ("7b", "cold_start")]  # `make test` compiles the first two
# Two layers of the larger ones, in short rows, on meshes that docs/scale.md has for them; each kind of TPU but tpu7x.
# `make test` compiles the first two, which use every axis of the mesh.
LARGE = [
    ("72b", "v5e:4x4", {"fsdp": 2, "sequence": 2, "tensor": 4}), ("72b", "v5p:8x8x8", {"data": 2, "fsdp": 64, "tensor": 4}),
    ("32b", "v4:2x2x4", {"fsdp": 16}), ("32b", "v5e:4x4", {"fsdp": 4, "sequence": 4}),
    ("32b", "v6e:16x16", {"fsdp": 64, "sequence": 4}), ("72b", "v6e:16x16", {"fsdp": 32, "sequence": 8}),
    ("32b", "v5p:8x8x8", {"data": 2, "fsdp": 256}),
]  # fmt: skip


def short_rows(size, mesh):
    """Returns a config of one row of 2,048 tokens for each part of a mesh, and the size's shape with two layers."""
    c, shape = qwen2_5_vl.aepo(size), PUBLISHED[size]
    c.mesh.update(mesh)
    c.packing.update(rows=c.mesh.data * c.mesh.fsdp, row_tokens=2048, row_patches=1024)
    vision = dataclasses.replace(shape.vision, num_layers=2, full_attention_layers=(1,))
    return c, dataclasses.replace(shape, text=dataclasses.replace(shape.text, num_layers=2), vision=vision)


@pytest.fixture(scope="module")
def large_steps():
    with ThreadPoolExecutor(2) as pool:
        yield [
            pool.submit(aot.without_code, *short_rows(size, mesh), topology).result
            for size, topology, mesh in (LARGE if EVERYTHING else LARGE[:2])
        ]


def paper_config(size, stage):
    """Returns the shipped config, with the rows that it has on the slice it is made for: 8 chips."""
    config = importlib.import_module(f"configs.qwen2_5_vl_{size}_{stage}").get_config()
    full = on_slice(config, 8, 2)
    assert full.packing.rows == 8 and full.packing.row_tokens == 32_768
    return full


@pytest.mark.parametrize("size, stage", [*SHIPPED[:2], *(slow(*case) for case in SHIPPED[2:])])
def test_the_step_of_a_shipped_config_fits_its_chips(steps, size, stage):
    program, config, shape = steps[size, stage, "more"](), paper_config(size, stage), PUBLISHED[size]
    assert not program.refused and program.peak < TPUS["v5p"].usable * GIB
    count = count_parameters(to_flat(abstract_model(shape)))
    assert program.resident["parameters"] == pytest.approx(4 * count / 8, rel=0.01)  # float32 over eight chips
    assert program.resident["optimizer"] == pytest.approx(8 * count / 8, rel=0.01)
    assert ("reference" in program.resident) == (stage == "aepo")
    # Activations of a row of 32,768 tokens: at least what the layers begin with, in bfloat16.
    assert program.temporary > shape.text.num_layers * config.packing.row_tokens * shape.text.hidden_size * 2
    kernels = kernel_flops(config, shape, 8)
    by_hand = config.packing.rows / 8 * sum(gradient_flops(row_flops(config, shape), remat=config.model.remat))
    assert program.work.flops + kernels["more"] == pytest.approx(by_hand, rel=0.1)
    # Sent, at least: the weights of the layers gathered in bfloat16 for both passes, seven eighths of each from others.
    assert sum(program.work.collective.values()) > 2 * 2 * 7 / 8 * 0.8 * count
    assert program.work.largest < count  # no collective sends half of the weights in bfloat16
    text = table({"more": program}, kernels, TPUS["v5p"])
    assert "activations" in text and "ms of network" in text


@pytest.mark.parametrize(
    "number", [0, 1, *map(slow, range(2, len(LARGE)))], ids=[f"{size}-{topology}" for size, topology, _ in LARGE]
)
def test_the_step_of_the_larger_shapes_compiles_on_large_slices(large_steps, number):
    (size, topology, mesh), program = LARGE[number], large_steps[number]()
    config, shape = short_rows(size, mesh)
    chips, chip = math.prod(mesh.values()), TPUS[topology.split(":")[0]]
    assert not program.refused and program.peak < chip.usable * GIB
    count = count_parameters(to_flat(abstract_model(shape)))
    split = chips / mesh.get("data", 1)
    assert program.resident["parameters"] == pytest.approx(4 * count / split, rel=0.05)
    flops = program.work.flops + kernel_flops(config, shape, chips)["more"]
    by_hand = config.packing.rows / chips * sum(gradient_flops(row_flops(config, shape), remat="full"))
    assert flops == pytest.approx(by_hand, rel=0.25)  # no loop of weight goes uncounted
    assert 0 < program.work.largest < 2 * count  # the embedding is a third of two layers' weights


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:16x16", "v5p:8x8x8"])
def test_a_search_answers_for_every_size_and_slice(size, topology):
    lines = list(search(qwen2_5_vl.aepo(size), PUBLISHED[size], topology, 0))
    if topology == "v5e:4x4" and size in ("32b", "72b"):  # their state alone takes 39 and 85 GiB of a chip
        assert sum("none of" in line for line in lines) == 3 and "take more chips" in lines[-1]
        assert sum("shorter rows" in line for line in lines) == 2
    else:
        assert re.match(r" +\d+ +\d+ +\d+ +\d+ +\d+  (none|dots|full|offload) ", lines[-1])


def test_the_fixed_log_probs_and_the_optimizer_of_the_7b_config_fit_its_chips(steps):
    config, shape = paper_config("7b", "aepo"), PUBLISHED["7b"]
    count = count_parameters(to_flat(abstract_model(shape)))
    fixed, apply = (steps["7b", "aepo", name]() for name in ("log_probs", "apply"))
    for program in (fixed, apply):
        assert not program.refused and program.peak < TPUS["v5p"].usable * GIB
        assert program.resident["optimizer"] == pytest.approx(8 * count / 8, rel=0.01)
    by_hand = config.packing.rows / 8 * sum(row_flops(config, shape))  # one pass
    assert fixed.work.flops + kernel_flops(config, shape, 8)["log_probs"] == pytest.approx(by_hand, rel=0.1)
    assert sum(fixed.work.collective.values()) > 2 * 7 / 8 * 0.8 * count and "gradients" not in fixed.resident
    # AdamW works in place and where the state lies: nothing but the norm is sent.
    assert apply.resident["gradients"] == apply.resident["parameters"] and apply.temporary + apply.new < 0.1 * GIB
    assert sum(apply.work.collective.values()) < GIB / 1024


@pytest.mark.parametrize(
    "topology, trees",
    [("v4:2x2x1", True), slow("v5e:2x2", True), slow("v5p:2x2x1", False), ("v5p:2x2x1", True), slow("v6e:2x2", True),
     ("tpu7x:2x2x1", False)],
)  # fmt: skip
def test_attention_of_long_rows_and_its_gradient_become_machine_code(topology, trees):
    mesh = make_mesh(fsdp=2, tensor=2, devices=aot.topology_devices(topology)[:4])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    query, key = (array((2, 4096, heads, 128), jnp.bfloat16) for heads in (16, 2))
    groups, spans = array((2, 4096), jnp.int32), array((2, 2, 4096), jnp.int32) if trees else None

    def loss(query, key, value, groups, spans):
        return self_attention(query, key, value, groups, spans, causal=True).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, groups, spans)
    program = aot.compile_lowered(lowered, {})
    assert "splash" in program.text and program.temporary < GIB


def test_a_prompt_cut_into_chunks_is_prefilled_by_the_kernel(devices):
    config, shape = planned("7b"), PUBLISHED["7b"]
    text, vision = (dataclasses.replace(part, num_layers=1) for part in (shape.text, shape.vision))
    config.model.param_dtype = "bfloat16"
    config.sampler.update(tensor=4, max_prompt_tokens=2048, prefill_chunk=1024, max_prompt_patches=256)
    shape = dataclasses.replace(shape, text=text, vision=vision)
    program = aot.sampler_programs(config, shape, devices, ("prefill",))["prefill"]
    assert not program.refused
    (called,) = (line for line in program.text.splitlines() if "splash_mha_fwd" in line)
    assert "tensor<7x1024x128xbf16>, tensor<1x2048x128xbf16>" in called  # 7 of 28 heads, fewer queries than keys


def test_decoding_does_not_copy_the_cache(devices):
    """A gather in another order than that of the scatter makes the compiler copy all pages at every layer."""
    config, shape = planned("3b"), PUBLISHED["3b"]
    shape = dataclasses.replace(shape, text=dataclasses.replace(shape.text, num_layers=2))
    config.sampler.update(pages=16_384)
    program = aot.sampler_programs(config, shape, devices, ("decode",))["decode"]
    cache, weights = program.resident["KV pages"], program.resident["parameters"]
    assert not program.refused and program.temporary < cache / 2 + weights / 2  # the weights in bfloat16
    # One copy of a layer and step would be 2 x 2 caches more.
    assert program.work.bytes < config.sampler.decode_steps * (cache + 2 * weights)


def test_a_program_that_is_too_large_says_so(devices):
    config, shape = planned("7b"), PUBLISHED["7b"]
    shape = dataclasses.replace(shape, text=dataclasses.replace(shape.text, num_layers=2))
    config.sampler.update(pages=2**19, page_size=64)
    programs = aot.sampler_programs(config, shape, devices, ("decode",))
    assert "exceeds available HBM" in programs["decode"].refused and "too large" in table(programs, {}, TPUS["v5p"])


def test_what_lies_beside_the_learner_is_counted():
    """Gradients in float32 whatever the parameters are; a reference in the host's memory, but for its log-probs; LoRA."""
    config, shape, mesh = planned("3b"), PUBLISHED["3b"], jax.devices()[:4]
    plain = aot._learner(config, shape, mesh)[0]
    assert plain["more"]["gradients"] == plain["more"]["parameters"] == plain["more"]["reference"]
    assert "gradients" not in plain["log_probs"] and "gradients" not in plain["first"]
    config.model.param_dtype = "bfloat16"
    config.aepo.kl.reference = "host"
    small = aot._learner(config, shape, mesh)[0]
    assert small["more"]["parameters"] * 2 == small["more"]["gradients"] == plain["more"]["gradients"]
    assert small["log_probs"]["reference"] == small["more"]["parameters"] and "reference" not in small["apply"]
    config.lora.rank = 16
    low_rank = aot._learner(config, shape, mesh)[0]
    assert low_rank["more"]["gradients"] < small["more"]["gradients"] / 50
    assert aot._fine_tuning(config, shape, mesh)[0]["more"]["optimizer"] < small["more"]["optimizer"] / 50


def test_loops_that_are_not_counted_are_told():
    for unknown in (0, 2):
        program = aot.Compiled({"parameters": GIB}, 0, 0, 0, Work(unknown_loops=unknown), 0.0, "")
        assert ("loops not counted" in table({"more": program}, {}, TPUS["v5p"])) == bool(unknown)


def test_learner_and_sampler_of_one_chip_are_added_up():
    config, chip = planned("7b"), TPUS["v5p"]

    def program(temporary, **resident):
        return aot.Compiled({k: v * GIB for k, v in resident.items()}, temporary * GIB, 0, 0, Work(), 0.0, "")

    learner = {"more": program(23, parameters=1, gradients=1), "apply": program(0, parameters=1, gradients=1)}
    sampler = {"decode": program(14, **{"parameters": 31, "KV pages": 28}), "prefill": program(14, **{"KV pages": 28})}
    line = colocated(config, learner, sampler, chip, 0)
    assert "98.0 of 95.0 GiB, which does not fit: more sampler.tensor" in line and "the first 1 of each host's" in line
    config.aepo.staleness = 0  # not at the same time; but new weights come while the old ones are there
    assert "91.0 of 95.0 GiB" in colocated(config, learner, sampler, chip, 0)
    assert "93.0 of 95.0 GiB" in colocated(config, learner, sampler, chip, GIB)
    assert "fit" not in colocated(config, learner, sampler, chip, GIB)


def test_weights_are_handed_over_layer_by_layer():
    """Of 7B's, a layer of the MLP; of a matrix that is no stack, 256 MiB."""
    config, devices = qwen2_5_vl.aepo("7b"), jax.devices()
    assert aot.largest_piece(config, PUBLISHED["7b"], devices) == 3584 * 18_944 * 4
    assert aot.largest_piece(config, PUBLISHED["72b"], devices) == 8192 * 29_568 * 4


def test_a_mesh_that_does_not_divide_the_slice_is_refused():
    config = planned("7b")
    config.mesh.update(fsdp=-1, tensor=16)
    with pytest.raises(UserError, match="tensor=16 does not fill 8 devices"):
        on_slice(config, 8, 2)


def test_what_a_search_finds_is_what_to_type():
    given = qwen2_5_vl.aepo("7b")
    lines = list(search(given, PUBLISHED["7b"], "v5p:4x4x4", 0))
    assert lines[0].startswith("Bounds, not measurements: 459 bf16 TFLOP/s")
    typed = [re.findall(r"--config\.(\S+)=(\S+)", line) for line in lines if "--config." in line]
    assert len(typed) > 5
    for flags in typed:
        config = given.copy_and_resolve_references()
        config.update_from_flattened_dict({name: value if "remat" in name else int(value) for name, value in flags})
        check_rows(config, 64, 16)
    assert overrides(given, given) == ""


def test_decoding_counts_the_operations_of_its_kernels():
    config, shape = planned("7b"), PUBLISHED["7b"]
    config.sampler.kernel = "tpu"
    context = config.sampler.max_prompt_tokens + config.sampler.max_response_tokens
    tokens = config.sampler.slots * config.sampler.decode_steps
    t = shape.text
    by_hand = tokens * (2 * t.hidden_size * t.vocab_size + 4 * t.num_layers * t.num_heads * t.head_dim * context)
    assert kernel_flops(config, shape, 4)["decode"] == by_hand
    config.sampler.tensor = 4
    assert kernel_flops(config, shape, 4)["decode"] == by_hand / 4
    config.sampler.update(kernel="", paged_attention="gather")  # the compiler's text has it all
    assert kernel_flops(config, shape, 4)["decode"] == 0


def test_a_micro_batch_has_a_row_for_every_part_of_the_mesh():
    config = qwen2_5_vl.aepo("7b")
    wide = on_slice(config, 128, 32)
    assert (wide.mesh.fsdp, wide.packing.rows) == (128, 128)
    config.packing.rows = 8  # which the trainers would refuse
    with pytest.raises(UserError, match="packing.rows=8 cannot be split over mesh data x fsdp = 128; .* or 0: a row"):
        on_slice(config, 128, 32)


def test_every_candidate_of_a_search_fills_the_slice():
    found = list(candidates(planned("7b"), PUBLISHED["7b"], 16, 4))
    assert len({tuple(c.mesh.values()) for c in found}) > 6
    for c in found:
        assert c.mesh.data * c.mesh.fsdp * c.mesh.sequence * c.mesh.tensor == 16
        check_rows(c, 16, 4)


def test_batches_have_the_shapes_that_are_compiled():
    config = default_config()
    (prompt,) = digits.prompts(1)
    request = rollout_request(
        prompt, seed=0, group_size=2, root_leaves=1, max_branches_per_sequence=1, tau_high=5.4, max_new_tokens=8
    )
    (group,) = digits.engine().generate([request])
    scored = replace(group, prompt=prompt, difficulty=1, correct=np.array([True, False]), rewards=np.array([1.0, 0.0]))
    with config.unlocked():
        config.aepo.window = 3
        config.packing.update(rows=2, row_tokens=64, row_patches=48, halvings=0)
    state = initial_state(config.aepo)._replace(tau_high=np.array(5.4))
    place = digits.placement()
    for segments, fields in (
        (learner_segments([scored], state, config.aepo), (*AEPO_FIELDS, *TREE_FIELDS)),
        ([example(prompt, group.leaves[0].token_ids)], SFT_FIELDS),
    ):
        (batch,) = pack(segments, **config.packing)
        expected = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert {name: (s.shape, s.dtype) for name, s in aot.batch_shapes(config, place, fields).items()} == expected


@pytest.mark.parametrize(
    "name, count", [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)]
)
def test_a_slice_has_a_device_a_chip_but_two_of_ironwood(name, count):
    assert len(aot.topology_devices(name)) == count
    chip = TPUS[name.split(":")[0]]
    assert chip.usable <= chip.hbm and (chip.unit == "half chips") == (count == 8)


def test_an_unknown_slice_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="--topology=v9:2x2: give one of v4, v5e, v5p"):
        aot.topology_devices("v9:2x2")


def test_bytes_are_those_of_one_chip():
    mesh = make_mesh(fsdp=4, tensor=2)
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    assert aot.bytes_per_chip({"a": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=split)}) == 2 * 3 * 4
