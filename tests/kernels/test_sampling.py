"""Against float64 NumPy; the Pallas kernel in the TPU interpreter against its twin, and through the TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.planning.aot import topology_devices
from kernels import sample_with_entropy
from tests.xla import OPTIMISED, slow


def exact(hidden, head, temperature, banned=None):
    """Returns log-probabilities [B, V] and entropy [B] in float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    if banned is not None:
        logits[:, banned] = -np.inf
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    return log_p, -np.sum(np.where(p > 0, p * np.where(p > 0, log_p, 0), 0), axis=1)


def random_case(rows, width, vocabulary, scale=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)).astype(np.float32), scale * rng.normal(size=(vocabulary, width)).astype(np.float32)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
@pytest.mark.parametrize("vocabulary", [7, 512, 1000])
def test_statistics_are_those_of_the_full_distribution(implementation, vocabulary):
    hidden, head = random_case(5, 32, vocabulary)
    banned = np.zeros(vocabulary, bool)
    banned[[1, 4]] = True
    token, log_prob, entropy = sample_with_entropy(
        hidden, head, jax.random.key(0), temperature=0.7, top_k=0, top_p=0.9, banned=jnp.array(banned),
        implementation=implementation,
    )  # fmt: skip
    log_p, h = exact(hidden, head, 0.7, banned)
    np.testing.assert_allclose(log_prob, log_p[np.arange(5), token], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, h, rtol=1e-5, atol=1e-5)
    assert not banned[np.asarray(token)].any()


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.5, 0), (0.9, 3), (1e-6, 0)])
def test_the_kernels_draw_what_their_twin_draws(top_p, top_k):
    hidden, head = random_case(9, 32, 700)
    results = [
        sample_with_entropy(hidden, head, jax.random.key(1), temperature=1.3, top_k=top_k, top_p=top_p, implementation=name)
        for name in ("xla", "tpu_interpret", "gpu_interpret")
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0][0], other[0])
        for a, b in zip(results[0][1:], other[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["tpu_interpret", "gpu_interpret"])
def test_the_kernels_draw_what_their_twin_draws_row_by_row(implementation):
    """More rows than a GPU's program takes, each with its own settings and key, bans, and rows that must draw again."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(70, 700)).astype(np.float32) * rng.uniform(0.5, 4.0, (70, 1)).astype(np.float32)
    logits[60:] = np.linspace(0.0, 0.01, 700, dtype=np.float32)  # three tokens are kept, and four candidates miss them
    settings = dict(
        temperature=jnp.array(rng.choice([0.0, 0.7, 1.0, 3.0], 60).tolist() + [1.0] * 10),
        top_k=jnp.array(rng.choice([0, 2, 50], 60).tolist() + [3] * 10, jnp.int32),
        top_p=jnp.array(rng.choice([0.0, 0.3, 0.99, 1.0], 60).tolist() + [1.0] * 10),
    )
    banned = jnp.arange(700) % 5 == 1
    hidden, head = jnp.eye(70), jnp.array(logits.T)
    keys = jax.random.split(jax.random.key(4), 70)
    mine, other = (
        sample_with_entropy(hidden, head, keys, banned=banned, implementation=name, **settings)
        for name in (implementation, "xla")
    )
    np.testing.assert_array_equal(mine[0], other[0])
    assert set(np.asarray(mine[0][60:])) <= set(np.flatnonzero(~np.asarray(banned))[-3:])
    for a, b in zip(mine[1:], other[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.8, 0), (1.0, 5), (0.9, 6)])
def test_draws_follow_the_exact_truncated_distribution(top_p, top_k):
    hidden, head = random_case(1, 16, 40)
    log_p, _ = exact(hidden, head, 1.0)
    p = np.exp(log_p[0])
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    kept = order[(before < top_p) & (np.arange(40) < (top_k or 40))]
    expected = np.zeros(40)
    expected[kept] = p[kept] / p[kept].sum()
    draw = jax.jit(
        lambda key: sample_with_entropy(
            jnp.broadcast_to(hidden, (20_000, 16)), head, key, temperature=1.0, top_k=jnp.int32(top_k),
            top_p=jnp.float32(top_p),
        )[0],
        compiler_options=OPTIMISED,
    )  # fmt: skip
    counts = sum(np.bincount(draw(key), minlength=40) for key in jax.random.split(jax.random.key(2), 10))
    assert counts[expected == 0].sum() == 0
    common = expected * counts.sum() > 5
    chi2 = np.sum((counts - expected * counts.sum())[common] ** 2 / (expected * counts.sum())[common])
    freedom = common.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
def test_extreme_logits(implementation):
    head = np.eye(8, dtype=np.float32)
    rows = np.stack([1e4 * np.eye(8)[3], np.zeros(8), -1e4 * np.eye(8)[0]]).astype(np.float32)
    token, log_prob, entropy = sample_with_entropy(
        rows, head, jax.random.key(0), temperature=1.0, top_k=0, top_p=0.99, implementation=implementation
    )
    assert token[0] == 3 and token[2] != 0
    np.testing.assert_allclose(log_prob, [0, -np.log(8), -np.log(7)], atol=1e-5)
    np.testing.assert_allclose(entropy, [0, np.log(8), np.log(7)], atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
def test_extreme_logits_in_any_tile(implementation):
    """Sums are carried over tiles of 512 whose largest logits lie 2e4 apart, either way, and over a tile that is banned."""
    tile = np.arange(1300) // 512
    rows = [1e4 * (np.arange(1300) == i) for i in (0, 511, 512, 1299)]  # one spike
    rows += [1e4 * (tile - 1.0), 1e4 * (1.0 - tile), -1e4 * (tile == 1), 1e4 * (tile == 1)]
    rows += [np.full(1300, 1e4), np.full(1300, -1e4), 1e4 * (np.arange(1300) % 2) - 5e3, 40.0 * np.cos(np.arange(1300))]
    logits = np.stack(rows).astype(np.float32)
    for banned in (tile == 3, tile == 1, tile != 2):
        token, log_prob, entropy = sample_with_entropy(
            jnp.eye(len(rows)), jnp.array(logits.T), jax.random.key(3), temperature=1.0, top_k=0, top_p=0.99,
            banned=jnp.array(banned), implementation=implementation,
        )  # fmt: skip
        log_p, h = exact(np.eye(len(rows)), logits.T, 1.0, banned)
        expected = log_p[np.arange(len(rows)), token]
        assert not banned[np.asarray(token)].any() and (expected > np.log(1e-5)).all()
        np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(entropy, h, rtol=1e-5, atol=1e-5)


def test_rows_have_their_own_settings_and_keys():
    hidden, head = random_case(4, 16, 50)
    keys = jax.random.split(jax.random.key(3), 4)
    settings = dict(
        temperature=jnp.array([0.0, 1.0, 0.5, 1.0]), top_k=jnp.array([0, 1, 0, 0]), top_p=jnp.array([1.0, 1.0, 0.5, 1.0])
    )
    token, log_prob, _ = sample_with_entropy(hidden, head, keys, **settings)
    best = np.argmax(hidden @ head.T, axis=1)
    assert token[0] == best[0] and token[1] == best[1]
    np.testing.assert_allclose(log_prob[0], exact(hidden, head, 1.0)[0][0, best[0]], rtol=1e-5)
    for row in range(4):  # a row's draw depends on its own key alone
        alone = sample_with_entropy(
            hidden[row : row + 1],
            head,
            keys[row : row + 1],
            **{name: value[row : row + 1] for name, value in settings.items()},
        )
        assert alone[0][0] == token[row]


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
def test_a_split_vocabulary_draws_what_a_whole_one_draws(implementation):
    hidden, head = random_case(9, 32, 1600, scale=0.2)
    banned = jnp.arange(1600) % 7 == 3
    keys = jax.random.split(jax.random.key(5), 9)
    settings = dict(
        temperature=jnp.array([1.0, 0.0, 3.0] * 3), top_k=jnp.array([0, 0, 0, 5, 5, 5, 0, 0, 0]),
        top_p=jnp.array([1.0] * 6 + [0.5] * 3),
    )  # fmt: skip
    whole = sample_with_entropy(hidden, head, keys, banned=banned, **settings)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("tensor",))
    part = jax.P("tensor")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(part, part), out_specs=part, check_vma=False)
    def draw(head, banned):
        found = sample_with_entropy(
            jnp.array(hidden), head, keys, banned=banned, implementation=implementation, axis_name="tensor", **settings
        )
        return jax.tree.map(lambda x: x[None], found)

    token, log_prob, entropy = map(np.asarray, draw(head, banned))
    for device in range(8):
        np.testing.assert_array_equal(token[device], whole[0])
        np.testing.assert_allclose(log_prob[device], whole[1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(entropy[device], whole[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, width, dtype", [(8, 2048, "bfloat16"), (64, 3584, "float32"), (256, 3584, "bfloat16")])
def test_the_gpu_kernel_lowers_to_triton(rows, width, dtype):
    shapes = [jax.ShapeDtypeStruct((count, width), dtype) for count in (rows, 151_936)]

    def draw(hidden, head):
        return sample_with_entropy(
            hidden, head, jax.random.key(0), temperature=1.0, top_k=0, top_p=0.99, implementation="gpu"
        )

    text = jax.jit(draw).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and f"{rows}x151936x" not in text


@pytest.mark.parametrize(
    "topology, width",
    [
        ("v4:2x2x1", 2048), ("v5e:2x2", 2048), ("v5p:2x2x1", 3584), ("v6e:2x2", 3584), ("tpu7x:2x2x1", 2048),
        slow("v4:2x2x1", 3584), slow("v5e:2x2", 3584), slow("v5p:2x2x1", 2048), slow("v6e:2x2", 2048),
        slow("tpu7x:2x2x1", 3584),
    ],
)  # fmt: skip
def test_the_tpu_compiler_takes_the_kernel_without_a_logits_buffer(topology, width):
    place = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])
    rows, vocabulary = 64, 151_936

    def shape(dimensions, dtype):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=place)

    def draw(hidden, head, keys, top_p, banned):
        keys = jax.random.wrap_key_data(keys)
        return sample_with_entropy(
            hidden, head, keys, temperature=1.0, top_k=0, top_p=top_p, banned=banned, implementation="tpu"
        )

    arguments = (
        shape((rows, width), jnp.bfloat16), shape((vocabulary, width), jnp.bfloat16), shape((rows, 2), jnp.uint32),
        shape((rows,), jnp.float32), shape((vocabulary,), bool),
    )  # fmt: skip
    no_logits(jax.jit(draw).lower(*arguments).compile(), rows, vocabulary)


def no_logits(compiled, rows, vocabulary):
    """The kernel is there and nothing of the size of the logits, nor an eighth of it, is."""
    text = compiled.as_text()
    assert "tpu_custom_call" in text and f"[{rows},{vocabulary}]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20 < rows * vocabulary * 4 / 2


def test_the_tpu_compiler_takes_the_kernel_with_a_split_vocabulary():
    mesh = jax.sharding.Mesh(topology_devices("v5e:2x2"), ("tensor",))
    rows, vocabulary, width = 64, 151_936, 3584
    part, whole = jax.P("tensor"), jax.P()

    @functools.partial(jax.shard_map, in_specs=(whole, part, whole, part), out_specs=whole, check_vma=False)
    def draw(hidden, head, keys, banned):
        return sample_with_entropy(
            hidden, head, jax.random.wrap_key_data(keys), temperature=1.0, top_k=0, top_p=jnp.float32(0.99), banned=banned,
            implementation="tpu", axis_name="tensor",
        )  # fmt: skip

    arguments = [
        jax.ShapeDtypeStruct(dimensions, dtype, sharding=jax.NamedSharding(mesh, spec))
        for dimensions, dtype, spec in (
            ((rows, width), jnp.bfloat16, whole), ((vocabulary, width), jnp.bfloat16, part), ((rows, 2), jnp.uint32, whole),
            ((vocabulary,), bool, part),
        )
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        no_logits(jax.jit(draw).lower(*arguments).compile(), rows, vocabulary // 4)
