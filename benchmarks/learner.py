"""One AEPO update of the demo's model on the same rollout trees, three ways: as trees, leaf by leaf, and in PyTorch.

    python -m benchmarks.learner --config=configs/digits_cpu.py --workdir=runs/benchmark

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
from ml_collections import ConfigDict
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax import cli
from ares_jax.aepo.batch import leaf_extras, learner_segments
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.scoring import ScoredGroup
from ares_jax.aepo.state import initial_state as initial_aepo
from ares_jax.checkpoints import save_hf
from ares_jax.models.params import with_params
from ares_jax.sampling.trajectory import RolloutGroup, Trajectory
from ares_jax.training import initial_state, make_optimizer, trainable
from ares_jax.training.update import TrainState
from ares_jax.workspace import open_workspace
from data_pipeline.packing import Segment, pack, padding_share, response_segment
from data_pipeline.prompts import Prompt

_PROMPTS, _ROOTS, _BRANCHES, _REPEATS = 32, 4, 4, 5
_LEARNING_RATE = 1e-4


def main(config: ConfigDict, workdir: Path) -> None:
    workspace = open_workspace(config, workdir)
    a = config.aepo
    rng = np.random.default_rng(0)
    prompts = workspace.prompts("train", limit=_PROMPTS)
    groups = [_group(prompt, rng, ~workspace.banned, a.window) for prompt in prompts]
    state = initial_aepo(a)._replace(tau_high=np.array(0.5))
    trees = learner_segments(groups, state, a)
    leaves = [
        response_segment(s.prompt, leaf.token_ids, extras)
        for s, group in zip(groups, leaf_extras(groups, state, a), strict=True)
        for leaf, extras in zip(s.group.leaves, group, strict=True)
    ]
    params = workspace.initial_params()
    reference = {name: 0.99 * value for name, value in params.items()}
    optimizer = make_optimizer(config.optimizer, learning_rate=_LEARNING_RATE, steps=100)
    trained = trainable(config.optimizer)
    learner = Learner(
        workspace.model, workspace.banned, optimizer, a, workspace.placement, temperature=1.0, trainable=trained
    )

    def start() -> TrainState:
        return initial_state(jax.tree.map(lambda x: x.copy(), params), optimizer, workspace.placement, trained)

    def update(segments: Sequence[Segment]) -> Callable[[TrainState], dict]:
        return lambda own: learner.update(own, pack(segments, **config.packing), reference)[1]

    for name, segments in (("policy", params), ("reference", reference)):
        save_hf(with_params(workspace.model, segments), workdir / name)
    results = {
        "trees": _measure(start, update(trees)),
        "leaf by leaf": _measure(start, update(leaves)),
        "PyTorch, leaf by leaf": _measure(
            lambda: _torch_start(workdir, config), lambda own: _torch_update(*own, leaves, workspace.banned, config)
        ),
    }
    for _, values in results.values():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(float(values[name]), float(results["trees"][1][name]), rtol=1e-4, err_msg=name)
    tokens = {"trees": sum(len(s.token_ids) for s in trees)}
    padding = {
        name: f"{padding_share(pack(segments, **config.packing)):.1%}"
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


def _group(prompt: Prompt, rng: np.random.Generator, allowed: np.ndarray, window: int) -> ScoredGroup:
    choices = np.flatnonzero(allowed)
    leaves: list[Trajectory] = []
    for number in range(_ROOTS + _BRANCHES):
        parent = int(rng.integers(_ROOTS)) if number >= _ROOTS else -1
        start = int(rng.integers(1, len(leaves[parent].token_ids))) if parent >= 0 else 0
        own = rng.choice(choices, int(rng.integers(15, 45)) - min(start, 14))
        tokens = np.concatenate([leaves[parent].token_ids[:start], own]) if parent >= 0 else own
        n = len(tokens)
        leaves.append(
            Trajectory(
                tokens, -4 - rng.random(n), rng.random(n), rng.random(n), rng.random(n) < 0.1, np.zeros(n, int), parent,
                start, "stop",
            )
        )  # fmt: skip
    correct = rng.random(len(leaves)) < 0.5
    group = RolloutGroup(prompt.problem_id, tuple(leaves), len(prompt.token_ids), 0, 0)
    return ScoredGroup(prompt, group, int(rng.integers(3)), correct, np.zeros(len(leaves)), correct.astype(float))


_TorchState = tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, torch.optim.Optimizer]


def _torch_start(workdir: Path, config: ConfigDict) -> _TorchState:
    """Returns policy, reference and optimizer before the first update."""
    policy, reference = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(workdir / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    o = config.optimizer
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not (o.freeze_vision and ".visual." in name))
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return policy, reference, torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(o.b1, o.b2), eps=o.eps, fused=True)


def _torch_update(
    policy: Qwen2_5_VLForConditionalGeneration, reference: Qwen2_5_VLForConditionalGeneration,
    optimizer: torch.optim.Optimizer, leaves: Sequence[Segment], banned: np.ndarray, config: ConfigDict,
) -> dict[str, float]:  # fmt: skip
    """The same loss by the definitions of method.md, in PyTorch, with the backward pass, the gradient's norm and AdamW."""
    total, mask = 0.0, torch.tensor(banned)
    order = sorted(range(len(leaves)), key=lambda i: len(leaves[i].token_ids))
    for begin in range(0, len(order), 32):
        part = [leaves[i] for i in order[begin : begin + 32]]
        log_probs = _torch_log_probs(policy, part, mask)
        with torch.no_grad():
            d = _torch_log_probs(reference, part, mask) - log_probs
        extra = {name: torch.tensor(_padded([s.extras[name] for s in part])) for name in part[0].extras}
        counted = extra["bucket"] > 0
        d = torch.where(counted, d + log_probs.detach() - log_probs, 0.0)
        advantage = extra["advantage"]
        ratio = torch.exp(torch.where(counted, log_probs - extra["old_log_prob"], 0.0).clamp(-20, 20))
        a = config.aepo
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - a.clip_low, 1 + a.clip_high))
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * a.clip_dual), loss)
        loss = loss + extra["kl_weight"] * (torch.expm1(d) - d).clamp(-10, 10)
        loss = torch.where(counted, extra["weight"] * loss, 0.0).sum()
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], config.optimizer.clip_norm)
    optimizer.step()
    return {"loss": total, "grad_norm": float(norm)}


def _torch_log_probs(model: Qwen2_5_VLForConditionalGeneration, part: Sequence[Segment], banned: torch.Tensor):
    tokens = torch.tensor(_padded([s.token_ids for s in part]), dtype=torch.long)
    positions = torch.tensor(np.stack([_padded([s.positions[axis] for s in part]) for axis in range(3)]), dtype=torch.long)
    real = torch.tensor(_padded([np.ones(len(s.token_ids), int) for s in part]))
    logits = model(
        input_ids=tokens,
        attention_mask=real,
        position_ids=positions,
        pixel_values=torch.tensor(np.concatenate([s.patches for s in part])),
        image_grid_thw=torch.tensor(np.concatenate([s.grid_thw for s in part]), dtype=torch.long),
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
    ).logits
    log_probs = torch.log_softmax(logits.masked_fill(banned, -torch.inf)[:, :-1], -1)
    picked = log_probs.gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(part), 1), picked], dim=1)


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(arrays), max(map(len, arrays))), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out


if __name__ == "__main__":
    cli.run(main)
