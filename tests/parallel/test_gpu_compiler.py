"""Programs and kernels through XLA's own compiler for GPUs, which needs no GPU: requirements-gpu-compiler.txt."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from ares_jax.errors import UserError
from ares_jax.models.flops import gradient_flops
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.chips import BETWEEN_HOSTS, GPUS, chip_of
from ares_jax.params import count_parameters, to_flat
from ares_jax.planning import aot, gpu_targets
from ares_jax.planning.fit import table
from ares_jax.planning.rooflines import kernel_flops, row_flops
from configs import qwen2_5_vl
from kernels import sample_with_entropy, token_log_probs_and_entropy, window_means
from tests.xla import slow

compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install --no-deps -r requirements-gpu-compiler.txt"
)
VOCABULARY = 151_936


def test_each_gpu_is_told_to_the_compiler_as_its_datasheet_has_it():
    for kind, chip in GPUS.items():
        told = dict(re.findall(r"(\w+): (\S+)", gpu_targets.target_config(kind)))
        assert int(told["device_memory_size"]) / 2**30 == pytest.approx(chip.hbm, rel=1e-3)
        assert int(told["memory_bandwidth"]) == pytest.approx(chip.bandwidth, rel=1e-3)
        assert chip.usable == pytest.approx(0.95 * chip.hbm, rel=2e-3)


def test_several_hosts_talk_as_slowly_as_the_network_between_them():
    assert chip_of("h200:8") == chip_of("h200:1x8") == GPUS["h200"]
    assert chip_of("h200:2x8") == dataclasses.replace(GPUS["h200"], link=BETWEEN_HOSTS)


@pytest.mark.parametrize("name", ["h200", "h200:0", "h200:2x", "h200:2x2x2", "h200:eight"])
def test_a_number_of_gpus_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="number of GPUs, such as h200:8"):
        aot.topology_devices(name)


@compiler
def test_gpus_of_several_hosts():
    devices = aot.topology_devices("h100:2x4")
    assert len(devices) == 8 and [d.process_index for d in devices] == [0] * 4 + [1] * 4
    assert devices[0].platform == "gpu" and "H100" in devices[0].device_kind


@compiler
@pytest.mark.parametrize(
    "kind, rows, width, dtype",
    [("h200", 64, 3584, jnp.bfloat16), slow("a100", 8, 2048, jnp.float32), slow("b200", 8, 2048, jnp.bfloat16)],
)
def test_the_sampling_kernel_is_compiled_and_makes_no_logits(kind, rows, width, dtype):
    (device,) = aot.topology_devices(f"{kind}:1")
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = [((rows, width), dtype), ((VOCABULARY, width), dtype), ((rows, 2), jnp.uint32), ((VOCABULARY,), jnp.bool_)]

    def compiled(implementation):
        def draw(hidden, head, keys, banned):
            keys = jax.random.wrap_key_data(keys)
            return sample_with_entropy(
                hidden, head, keys, temperature=1.0, top_k=0, top_p=0.99, banned=banned, implementation=implementation
            )

        return jax.jit(draw).lower(*(jax.ShapeDtypeStruct(s, t, sharding=place) for s, t in shapes)).compile()

    kernel, twin = compiled("gpu"), compiled("xla")
    logits = f"[{rows},{VOCABULARY}]"
    assert "triton" in kernel.as_text() and f"f32{logits}" not in kernel.as_text() and f"f32{logits}" in twin.as_text()
    buffer = 4 * rows * VOCABULARY
    assert kernel.memory_analysis().temp_size_in_bytes < buffer / 2 and twin.memory_analysis().temp_size_in_bytes > buffer


@compiler
def test_the_other_triton_kernels_are_compiled():
    (device,) = aot.topology_devices("h200:1")
    place = jax.sharding.SingleDeviceSharding(device)

    def compiled(f, *shapes):
        text = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, t, sharding=place) for s, t in shapes)).compile().as_text()
        assert "triton" in text
        return text

    def log_probs(hidden, head, targets):
        return token_log_probs_and_entropy(hidden, head, targets, temperature=1.0, implementation="gpu")

    text = compiled(
        log_probs, ((1024, 3584), jnp.bfloat16), ((VOCABULARY, 3584), jnp.bfloat16), ((1024,), jnp.int32)
    )  # fmt: skip
    assert f"f32[1024,{VOCABULARY}]" not in text
    compiled(lambda h, m: window_means(h, m, 4, implementation="gpu"), ((8, 4096), jnp.float32), ((8, 4096), jnp.bool_))


@pytest.fixture(scope="module")
def planned():
    """Returns the 3B config on one GPU, rows of 4,096 tokens, and its shape with two layers of each tower."""
    config, shape = qwen2_5_vl.aepo("3b"), PUBLISHED["3b"]
    config.mesh.update(data=1, fsdp=1, sequence=1, tensor=1)
    config.packing.update(rows=1, row_tokens=4096, row_patches=4096)
    config.sampler.update(max_response_tokens=2048, prefill_batch=1, pages=1024)
    few = {"text": dataclasses.replace(shape.text, num_layers=2)}
    few["vision"] = dataclasses.replace(shape.vision, num_layers=2, full_attention_layers=(1,))
    return config, dataclasses.replace(shape, **few)


@compiler
def test_a_learner_step_attends_by_cudnn_and_all_its_products_are_counted(planned):
    config, shape = planned
    program = aot.learner_programs(config, shape, aot.topology_devices("h200:1"), ("more",))["more"]
    assert "cudnn$fmha" in program.text
    kernels = kernel_flops(config, shape, 1, "gpu")
    by_hand = sum(gradient_flops(row_flops(config, shape), remat="full"))
    assert program.work.flops + kernels["more"] == pytest.approx(by_hand, rel=0.1)
    assert not program.work.unknown_loops and program.peak < GPUS["h200"].usable * 2**30
    assert "of 141.0 GiB" in table({"more": program}, kernels, GPUS["h200"])


@compiler
def test_the_samplers_programs_as_the_engine_runs_them_on_gpus(planned):
    config, shape = planned
    programs = aot.sampler_programs(config, shape, aot.topology_devices("h200:1"))
    weights = programs["decode"].resident["parameters"]
    assert weights < 2.1 * count_parameters(to_flat(abstract_model(shape)))  # bfloat16, though trained in float32
    # Layers come one by one: none is copied out of a stack, and no weight is rounded in the step.
    assert programs["decode"].temporary < 2 * 2**30
    assert programs["decode"].work.flops == pytest.approx(_decode_flops(config, shape), rel=0.1)


def _decode_flops(config, shape):
    s, t = config.sampler, shape.text
    width, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    layer = t.hidden_size * (2 * width + 2 * kv + 3 * t.intermediate_size)
    attention = 2 * width * (s.max_prompt_tokens + s.max_response_tokens)
    token = 2 * (t.num_layers * (layer + attention) + t.vocab_size * t.hidden_size)
    return s.slots * s.decode_steps * token


@compiler
def test_decoding_by_triton_kernels(planned):
    """Pages are read where they lie: fewer bytes than the gather's copies. With the sampling kernel logits are never made.

    That kernel's bytes are not compared: its loop over candidates mostly ends after the first and is counted to its limit.
    """
    config, shape = planned
    config = config.copy_and_resolve_references()

    def decode(**settings):
        config.sampler.update(settings)
        return aot.sampler_programs(config, shape, aot.topology_devices("h200:1"), ("decode",))["decode"]

    gathered, read_in_place = decode(), decode(paged_attention="triton")
    assert read_in_place.work.bytes < 0.6 * gathered.work.bytes
    assert decode(kernel="gpu").temporary < gathered.temporary / 4
