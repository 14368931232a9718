"""One AEPO update of the demo's model on the same rollout trees, three ways: as trees, leaf by leaf, and in PyTorch.

    python -m benchmarks.learner --config=configs/digits_cpu.py --workdir=runs/benchmark
    python -m benchmarks.learner --config=configs/qwen2_5_vl_3b_aepo.py --workdir=runs/benchmark --large   # an accelerator

With --large the learner and the sampler of a published shape: `benchmarks/large.py`. Without:

Random weights, random responses of the digits task's lengths, branches at random places. PyTorch is `transformers`' own
model under autograd, leaves padded to batches of 32; it computes the same loss, which is checked. An update is the
reference's log-probs, the gradient, clipping and AdamW; each starts from the same state, made before the clock runs
(PyTorch's moments are made by its step: milliseconds).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from absl import flags
from ml_collections import ConfigDict
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.aepo.batch import learner_segments
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.state import initial_state as initial_aepo
from ares_jax.checkpoints import save_hf
from ares_jax.commands import cli
from ares_jax.params import with_params
from ares_jax.run.run import open_run
from ares_jax.training import initial_state, make_optimizer, trainable
from ares_jax.training.update import TrainState
from benchmarks import large
from benchmarks.learner_peer import torch_optimizer, torch_update
from benchmarks.random_trees import leaf_segments, random_group
from data_pipeline.packing import Segment, pack

_LARGE = flags.DEFINE_bool("large", False, "a published shape in bfloat16, learner and sampler: benchmarks/large.py")
_PROMPTS, _REPEATS = 32, 5
_LEARNING_RATE = 1e-4


def main(config: ConfigDict, workdir: Path) -> None:
    if _LARGE.value:
        large.measure(config, workdir)
        return
    run = open_run(config, workdir)
    a = config.aepo
    rng = np.random.default_rng(0)
    prompts = run.prompts("train", limit=_PROMPTS)
    groups = [random_group(prompt, rng, ~run.banned) for prompt in prompts]
    state = initial_aepo(a)._replace(tau_high=np.array(0.5))
    trees = learner_segments(groups, state, a)
    leaves = leaf_segments(groups, state, a)
    params = run.initial_params()
    reference = {name: 0.99 * value for name, value in params.items()}
    optimizer = make_optimizer(config.optimizer, learning_rate=_LEARNING_RATE, steps=100)
    trained = trainable(config.optimizer)
    learner = Learner(
        run.model, run.banned, optimizer, a, run.placement, temperature=1.0, trainable=trained
    )

    def start() -> TrainState:
        return initial_state(jax.tree.map(lambda x: x.copy(), params), optimizer, run.placement, trained)

    def update(segments: Sequence[Segment]) -> Callable[[TrainState], dict]:
        return lambda own: learner.update(own, pack(segments, **config.packing), reference)[1]

    for name, segments in (("policy", params), ("reference", reference)):
        save_hf(with_params(run.model, segments), workdir / name)
    results = {
        "trees": _measure(start, update(trees)),
        "leaf by leaf": _measure(start, update(leaves)),
        "PyTorch, leaf by leaf": _measure(
            lambda: _torch_start(workdir, config), lambda own: torch_update(*own, leaves, run.banned, config)
        ),
    }
    for _, values in results.values():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(float(values[name]), float(results["trees"][1][name]), rtol=1e-4, err_msg=name)
    tokens = {"trees": sum(len(s.token_ids) for s in trees)}
    padding = {
        name: f"{pack(segments, **config.packing).padding:.1%}"
        for name, segments in (("trees", trees), ("leaf by leaf", leaves))
    }
    whole = sum(len(s.token_ids) for s in leaves)
    print("\n| update | tokens | padding | seconds | tokens of leaves a second | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|")
    for name, (seconds, values) in results.items():
        print(
            f"| {name} | {tokens.get(name, whole):,} | {padding.get(name, '')} | {seconds:.2f} | {whole / seconds:,.0f} "
            f"| {float(values['loss']):.7f} | {float(values['grad_norm']):.6f} |"
        )


def _measure(start: Callable[[], Any], update: Callable[[Any], dict]) -> tuple[float, dict]:
    """Returns the best time of a few updates after a first one, which compiles."""
    values, times = update(start()), []
    for _ in range(_REPEATS):
        state = jax.block_until_ready(start())
        begin = time.perf_counter()
        values = update(state)
        times.append(time.perf_counter() - begin)
    return min(times), values


_TorchState = tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, torch.optim.Optimizer]


def _torch_start(workdir: Path, config: ConfigDict) -> _TorchState:
    """Returns policy, reference and optimizer before the first update."""
    policy, reference = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(workdir / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    return policy, reference, torch_optimizer(policy, config, _LEARNING_RATE)


if __name__ == "__main__":
    cli.run(main)
