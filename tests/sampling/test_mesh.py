"""The engine split over virtual devices draws what it draws on one, and moves neither head nor logits nor cache."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.paged import cached_heads
from ares_jax.params import to_flat, with_params
from ares_jax.planning import aot
from ares_jax.run.samplers import sampler_mesh
from ares_jax.sampling.local import LocalSampler
from ares_jax.sampling.rows import to_rows
from configs import qwen2_5_vl
from tests import digits
from tests.sampling.test_engine import request

GIB = 2**30


def split_engine(tensor, **sizes):
    """An engine over `tensor` devices; its weights are zeros."""
    place = digits.placement(tensor=tensor)
    zeros = {name: jnp.zeros_like(value) for name, value in to_flat(digits.model()).items()}
    return digits.engine(other=with_params(digits.model(), place.put(zeros)), **sizes)


def requests():
    """All with images, of one shape: sampled, hotter, truncated, greedy."""
    prompts = [p for p in digits.prompts(12) if len(p.patches) == 8]
    settings = (
        dict(temperature=1.0), dict(temperature=1.2), dict(top_p=0.9, top_k=40),
        dict(temperature=0.0, group_size=2, root_leaves=1),
    )  # fmt: skip
    return [request(p, seed=i, **s) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]


@pytest.fixture(scope="module")
def expected():
    return digits.engine().generate(requests())


# Of 4 query and 2 key/value heads: split, and split with copies; and prompts in chunks, attended whole and in tiles.
@pytest.mark.parametrize("tensor, chunk, blocks", [(2, 0, False), (4, 0, False), (4, 16, False), (4, 16, True)])
def test_trees_are_those_of_one_device(expected, tensor, chunk, blocks, monkeypatch):
    shapes = digits.attend_in_blocks(monkeypatch, block=8) if blocks else set()
    engine = split_engine(tensor, prefill_chunk=chunk)
    learner = digits.placement(fsdp=2, tensor=2)
    LocalSampler(engine).push_weights(learner.put(to_flat(digits.model())), 3)
    for group, other in zip(engine.generate(requests()), expected, strict=True):
        for a, b in zip(group.leaves, other.leaves, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            assert (a.parent, a.branch_position, set(a.policy_version)) == (b.parent, b.branch_position, {3})
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)
            np.testing.assert_allclose(a.entropies, b.entropies, atol=2e-5)
    assert any(group.branches for group in expected)
    assert engine._kv_pages.addressable_shards[0].data.shape[3] == 2  # a key and a value head
    assert all(shard.data.size == engine._kv_pages.size // tensor for shard in engine._kv_pages.addressable_shards)
    assert shapes == ({(16, 32)} if blocks else set())  # two tiles of queries, four of keys


def test_a_decode_step_sends_hidden_states_and_statistics_only():
    engine, rows = split_engine(2), 16
    with engine._on_mesh():
        program = engine._programs.decode.lower(
            engine._policy.params, engine._kv_pages, np.zeros((rows, 8), np.int32), to_rows([], rows, 3)
        ).compile()
    sent = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program.as_text()
    )
    sizes = [
        math.prod(int(d) for d in dims.split(",") if d)
        for shapes in sent
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes)
    ]
    width = digits.model().config.text.hidden_size
    assert rows * width in sizes  # what attention and MLP give
    assert max(sizes) <= rows * width < rows * digits.VOCABULARY / 2  # never logits, head, embedding, pages


def test_the_cache_holds_a_head_for_every_part_of_the_query_heads():
    assert [cached_heads(28, 4, parts) for parts in (1, 2, 4, 8)] == [4, 4, 4, 4]  # 28 heads are not split by 8
    assert [cached_heads(16, 2, parts) for parts in (1, 2, 4, 8)] == [2, 2, 4, 8]


def test_decoding_7b_fits_four_chips_of_16_gib():
    config, shape = qwen2_5_vl.aepo("7b"), PUBLISHED["7b"]
    config.model.param_dtype = "bfloat16"
    config.sampler.update(tensor=4, pages=2048, kernel="tpu")
    program = aot.sampler_programs(config, shape, aot.topology_devices("v5e:2x2"), ("decode",))["decode"]
    assert not program.refused and program.peak < 16 * GIB
    assert program.resident["KV pages"] == 28 * 2048 * 64 * 2 * 128 * 2  # one key/value head of four
    assert program.temporary < program.resident["KV pages"] / 4  # no copy of it
    rows, steps = config.sampler.slots, config.sampler.decode_steps
    assert program.work.collective["all-gather"] < steps * rows * 1024  # candidates
    # Two sums of hidden states a layer, and one of embeddings, sent twice (to sum, to tell) but for a chip's own part.
    sums = steps * (2 * 28 + 1) * rows * 3584 * 2
    assert program.work.collective["all-reduce"] == pytest.approx(2 * 3 / 4 * sums, rel=0.1)


def test_more_devices_than_there_are_is_an_error():
    config = default_config()
    assert sampler_mesh(config).size == 1
    config.sampler.tensor = 2
    assert dict(sampler_mesh(config).shape)["tensor"] == 2
    config.sampler.tensor = 9
    with pytest.raises(UserError, match="sampler.tensor=9: this host has 8 devices"):
        sampler_mesh(config)
