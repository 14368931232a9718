"""One draw with log-probability and entropy, against what it would be made of otherwise.

    python -m benchmarks.entropy_kernel [--rows=1,8,64] [--widths=2048] [--implementations=xla]

Where it runs (CPU, GPU, TPU) it is timed: contestants take turns, the best of several rounds counts, as others may use
the machine. The bound is the time to read the LM head once at the measured memory bandwidth. With `--tpu=v5e:2x2,...`
nothing is timed: the TPU's compiler says how much temporary memory kernel and twin take at top-p 0.99, which bytes they
access, and how what goes in and comes out lies in memory. XLA counts its own bytes; a kernel's are what it declares
(`pl.CostEstimate`): the head four times, to draw and to test the candidates, and both again in the loop that draws again,
which hardly ever runs. The twin's logits are made once.
"""

import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from kernels import sample_with_entropy

_ROWS = flags.DEFINE_list("rows", ["1", "8", "64"], "batch sizes")
_WIDTHS = flags.DEFINE_list("widths", ["768"], "hidden sizes")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 151_936, "tokens")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of hidden states and head")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["xla"], "of `sample_with_entropy`")
_ROUNDS = flags.DEFINE_integer("rounds", 12, "each contestant runs once a round")
_TPU = flags.DEFINE_list("tpu", [], "topologies to compile for instead, such as v5e:2x2, v5p:2x2x1, v6e:2x2")


def main(_: Sequence[str]) -> None:
    if _TPU.value:
        _compile()
        return
    for width in map(int, _WIDTHS.value):
        _time(width)


def _time(width: int) -> None:
    dtype, key = jnp.dtype(_DTYPE.value), jax.random.key(0)
    head = (jax.random.normal(key, (_VOCABULARY.value, width)) * 0.05).astype(dtype)
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), head {head.shape} {dtype}, ms, best of {_ROUNDS.value}\n")
    print("| rows | " + " | ".join(_contestants()) + " | head / bandwidth | GB/s |")
    print("|---" * (len(_contestants()) + 3) + "|")
    for rows in map(int, _ROWS.value):
        hidden = jax.random.normal(key, (rows, width)).astype(dtype)
        calls = {name: jax.jit(f) for name, f in _contestants().items()} | {"bandwidth": jax.jit(_read)}
        best = {name: float("inf") for name in calls}
        for turn in range(_ROUNDS.value + 1):  # the first one compiles
            for name, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call(hidden, head, jax.random.fold_in(key, turn)))
                best[name] = min(best[name], time.perf_counter() - begin) if turn else best[name]
        bound = best.pop("bandwidth")
        cells = [f"{1e3 * seconds:.2f}" for seconds in (*best.values(), bound)]
        print(f"| {rows} | " + " | ".join(cells) + f" | {head.nbytes / bound / 1e9:.1f} |", flush=True)


def _contestants() -> dict[str, Callable]:
    ours = {f"{name}, top-p {p}": _ours(name, p) for name in _IMPLEMENTATIONS.value for p in (1.0, 0.99)}
    return {**ours, "(a) XLA, top-p 1": _plain, "(b) matmul, argmax": _greedy}


def _ours(implementation: str, top_p: float) -> Callable:
    def draw(hidden, head, key):
        return sample_with_entropy(hidden, head, key, temperature=0.9, top_k=0, top_p=top_p, implementation=implementation)

    return draw


def _logits(hidden, head):
    return jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)


def _plain(hidden, head, key):
    logits = _logits(hidden, head) / 0.9
    log_p = jax.nn.log_softmax(logits)
    token = jax.random.categorical(key, logits)
    return token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0], -jnp.sum(jnp.exp(log_p) * log_p, axis=1)


def _greedy(hidden, head, key):
    return jnp.argmax(_logits(hidden, head), axis=1)


def _read(hidden, head, key):
    return jnp.sum(head, axis=1, dtype=jnp.float32)  # looks at every byte and does hardly anything else


def _compile() -> None:
    print("| TPU | width | rows | MiB: a logits buffer | kernel, temporary | twin | GB accessed: kernel, declared | twin |")
    print("|---|---|---|---|---|---|---|---|")
    layouts = []
    for name in _TPU.value:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for width in map(int, _WIDTHS.value):
            for rows in map(int, _ROWS.value):
                found = [_compiled(rows, width, device, implementation) for implementation in ("tpu", "xla")]
                memory = [x.memory_analysis().temp_size_in_bytes / 2**20 for x in found]
                moved = [x.cost_analysis()["bytes accessed"] / 1e9 for x in found]
                cells = [f"{rows * _VOCABULARY.value * 4 / 2**20:.1f}"]
                cells += [f"{x:.2f}" for x in (*memory, *moved)]
                print(f"| {name} | {width} | {rows} | " + " | ".join(cells) + " |", flush=True)
                layouts.append((name, re.search(r"entry_computation_layout=\{(.*?)\}, \w+=", found[0].as_text())[1]))
    print()
    for name, layout in layouts:
        print(f"{name}: {layout}")


def _compiled(rows: int, width: int, device: jax.Device, implementation: str):
    place, draw = jax.sharding.SingleDeviceSharding(device), _ours(implementation, 0.99)
    shapes = [
        jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for shape, kind in (
            ((rows, width), jnp.bfloat16), ((_VOCABULARY.value, width), jnp.bfloat16), ((rows, 2), jnp.uint32)
        )
    ]  # fmt: skip
    return jax.jit(lambda h, w, k: draw(h, w, jax.random.wrap_key_data(k))).lower(*shapes).compile()


if __name__ == "__main__":
    app.run(main)
