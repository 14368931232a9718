import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from kernels import token_log_probs_and_entropy
from kernels.log_probs_xla import chunk_of
from tests.xla import slow

EACH = pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])


def naive(hidden, head, targets, temperature, banned):
    logits = jnp.where(banned, -jnp.inf, hidden @ head.T / temperature)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(banned, 0.0, p * jnp.where(banned, 0.0, log_p)), axis=1)
    return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], entropy


@pytest.mark.parametrize("count", [1, 50, 130])
def test_values_and_gradients_equal_the_naive_ones(count):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((count, 16), (33, 16)))
    targets = jnp.asarray(rng.integers(2, 33, count))
    banned = jnp.arange(33) < 2
    weights = jnp.asarray(rng.normal(size=(2, count)), jnp.float32)

    def loss(function):
        def value(hidden, head):
            log_prob, entropy = function(hidden, head)
            return jnp.sum(weights[0] * log_prob + weights[1] * entropy)

        return jax.value_and_grad(value, argnums=(0, 1))(hidden, head)

    mine = loss(lambda h, w: token_log_probs_and_entropy(h, w, targets, temperature=0.8, banned=banned, chunk=64))
    other = loss(lambda h, w: naive(h, w, targets, 0.8, banned))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_memory_does_not_grow_with_the_logits():
    count, vocabulary, width = 16_384, 32_768, 8

    def loss(hidden, head, targets):
        return sum(x.sum() for x in token_log_probs_and_entropy(hidden, head, targets, temperature=1.0))

    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((count, width), jnp.float32), ((vocabulary, width), jnp.float32), ((count,), jnp.int32))
    ]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < count * vocabulary * 4 / 2


def test_the_chunk_shrinks_where_the_vocabulary_grows():
    assert [chunk_of(v) for v in (448, 151_936, 4 * 151_936, 10**9)] == [1024, 1024, 256, 1]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="temperature=0"):
        token_log_probs_and_entropy(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.array([0]), temperature=0)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        token_log_probs_and_entropy(
            jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.array([0]), temperature=1.0, implementation="cuda"
        )


def exact(hidden, head, targets, temperature):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return log_p[np.arange(len(targets)), targets], -np.sum(np.exp(log_p) * log_p, axis=1)


@EACH
@pytest.mark.parametrize(
    ("count", "vocabulary", "dtype", "tolerance"),
    [
        (37, 97, jnp.float32, 1e-5), (37, 96, jnp.bfloat16, 5e-3), (5, 151_936, jnp.float32, 1e-5),
        (5, 151_936, jnp.bfloat16, 5e-3),
    ],
)  # fmt: skip
def test_values_against_float64(implementation, count, vocabulary, dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = (0.4 * jax.random.normal(keys[0], (count, 24))).astype(dtype)
    head = jax.random.normal(keys[1], (vocabulary, 24)).astype(dtype)
    targets = jax.random.randint(keys[2], (count,), 0, vocabulary)
    got = token_log_probs_and_entropy(hidden, head, targets, temperature=0.7, chunk=16, implementation=implementation)
    for value, expected in zip(got, exact(hidden, head, targets, 0.7), strict=True):
        np.testing.assert_allclose(value, expected, rtol=tolerance)


@EACH
def test_extreme_logits_have_values_and_gradients(implementation):
    """Rows of given logits, by a hidden state that is the identity; a tile of the vocabulary has at most 512 tokens."""
    ids = np.arange(1300)
    rows = np.stack([
        np.where(ids % 2, 1e4, -1e4), np.zeros(1300), np.full(1300, 1e4), np.full(1300, -1e4), 1e4 * np.eye(1300)[4],
        np.where(ids < 100, 1e4, -1e4), np.where(ids >= 1250, 1e4, -1e4), 1e4 * np.eye(1300)[1299] - 1e4 * np.eye(1300)[0],
    ])  # fmt: skip
    targets = np.array([1, 3, 32, 1299, 4, 0, 1299, 1299])
    for banned in (None, (ids >= 512) & (ids < 1024)):  # none, and a whole tile

        def both(hidden, head, banned=banned):
            return token_log_probs_and_entropy(
                hidden, head, jnp.array(targets), temperature=1.0, banned=None if banned is None else jnp.array(banned),
                implementation=implementation,
            )  # fmt: skip

        hidden, head = jnp.eye(8), jnp.array(rows.T, jnp.float32)
        logits = rows if banned is None else rows[:, ~banned]
        places = targets if banned is None else np.where(targets >= 1024, targets - 512, targets)
        for value, expected in zip(both(hidden, head), exact(np.eye(8), logits.T, places, 1.0), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        d_hidden, d_head = jax.grad(lambda h, w, both=both: sum(x.sum() for x in both(h, w)), argnums=(0, 1))(hidden, head)
        log_p = logits - logits.max(1, keepdims=True)  # float64
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p, chosen = np.exp(log_p), places[:, None] == np.arange(logits.shape[1])
        entropy = -(p * log_p).sum(1, keepdims=True)
        d_logits = chosen - p - p * (log_p + entropy)
        mine = np.asarray(d_head).T if banned is None else np.asarray(d_head).T[:, ~banned]
        np.testing.assert_allclose(mine, d_logits, rtol=1e-5, atol=1e-8)
        error = np.abs(d_hidden - d_logits @ logits.T)
        assert (error <= 1e-5 * (np.abs(d_logits) @ np.abs(logits).T)).all()  # of terms up to 1e4 that cancel


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)])
def test_gradients_against_autodiff_at_a_large_odd_vocabulary(implementation, dtype, tolerance):
    rng = np.random.default_rng(3)
    hidden, head = (jnp.asarray(rng.normal(size=s), dtype) for s in ((21, 24), (5003, 24)))
    targets, banned = jnp.asarray(rng.integers(2, 5003, 21)), jnp.arange(5003) < 2
    weights = jnp.asarray(rng.normal(size=(2, 21)), jnp.float32)

    def gradients(function, *arguments):
        return jax.grad(lambda h, w: sum(a @ b for a, b in zip(weights, function(h, w), strict=True)), argnums=(0, 1))(
            *arguments
        )

    mine = gradients(
        lambda h, w: token_log_probs_and_entropy(
            h, w, targets, temperature=0.8, banned=banned, implementation=implementation
        ),
        hidden, head,
    )  # fmt: skip
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
    for a, b in zip(mine, gradients(lambda h, w: naive(h, w, targets, 0.8, banned), *wide), strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < tolerance * np.linalg.norm(b)


@EACH
def test_a_row_without_a_distribution_is_nan_and_harms_no_other(implementation):
    hidden = jnp.eye(2).at[0, 0].set(jnp.nan)
    head = jnp.ones((20, 2)).at[:, 0].set(0.0)
    for value in token_log_probs_and_entropy(
        hidden, head, jnp.array([1, 1]), temperature=1.0, implementation=implementation
    ):
        np.testing.assert_array_equal(np.isnan(value), [True, False])
    banned = jnp.ones(20, bool)
    log_prob, entropy = token_log_probs_and_entropy(
        jnp.ones((1, 2)), head, jnp.array([1]), temperature=1.0, banned=banned, implementation=implementation
    )
    assert np.isnan(log_prob[0]) and np.isnan(entropy[0])


@EACH
def test_a_banned_target_takes_no_gradient(implementation):
    banned = jnp.arange(9) == 7

    def log_prob(hidden):
        return token_log_probs_and_entropy(
            hidden, jnp.eye(9), jnp.array([7]), temperature=1.0, banned=banned, implementation=implementation
        )[0][0]

    assert log_prob(jnp.ones((1, 9))) == -jnp.inf
    assert not jax.grad(log_prob)(jnp.ones((1, 9))).any()


@pytest.mark.parametrize("width, dtype", [(2048, "bfloat16"), (3584, "float32")])
def test_the_gpu_kernel_lowers_to_triton(width, dtype):
    hidden, head = (jax.ShapeDtypeStruct((count, width), dtype) for count in (4096, 151_936))

    def values(*arguments):
        return token_log_probs_and_entropy(*arguments, temperature=1.0, implementation="gpu")

    targets = jax.ShapeDtypeStruct((4096,), jnp.int32)
    text = jax.jit(values).trace(hidden, head, targets).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and "x151936x" not in text


@pytest.mark.parametrize(
    "topology, width, backward",
    [
        ("v5e:2x2", 2048, True), ("v5p:2x2x1", 2048, False), ("v6e:2x2", 3584, False),
        slow("v5e:2x2", 3584, False), slow("v5p:2x2x1", 3584, True), slow("v6e:2x2", 2048, True),
    ],
)  # fmt: skip
def test_the_tpu_compiler_takes_the_kernels_without_a_logits_buffer(topology, width, backward):
    """Machine code of the backward pass at D = 3584 takes half a minute: it is made for the v5p alone."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    place = jax.sharding.SingleDeviceSharding(devices[0])
    count, vocabulary = 4096, 151_936

    def loss(hidden, head, targets, banned):
        found = token_log_probs_and_entropy(hidden, head, targets, temperature=1.0, banned=banned, implementation="tpu")
        return sum(x.sum() for x in found)

    arguments = [
        jax.ShapeDtypeStruct(dimensions, dtype, sharding=place)
        for dimensions, dtype in (
            ((count, width), jnp.bfloat16), ((vocabulary, width), jnp.bfloat16), ((count,), jnp.int32),
            ((vocabulary,), bool),
        )
    ]  # fmt: skip
    programs = [loss] + [jax.grad(loss, argnums=(0, 1))] * backward
    for program, calls in zip(programs, (1, 3), strict=False):
        lowered = jax.jit(program).lower(*arguments)
        text = lowered.as_text()  # not the compiled one: jaxlib 0.10.2 cannot read asynchronous copies of libtpu 0.0.51
        assert text.count("@tpu_custom_call") == calls
        assert not any(f"{shape}x" in text for shape in (f"{count}x{vocabulary}", f"{vocabulary}x{count}"))
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 2**20  # nor anything of N x D or V x D
