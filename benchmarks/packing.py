"""`python -m benchmarks.packing`: what the learner computes for nothing in updates of the 7B configs, of made-up lengths.

Prompts of 200 to 4,096 tokens (median 1,000). Answers of a problem spread around a length of its own, log-normal (median
2,000 for AEPO, 2,700 for fine-tuning), up to 16,384. A tree has four roots, and up to four branches anywhere on them.
No model and no pixels: only the plan of the rows, on one host with eight chips.
"""

import argparse
import time

import numpy as np
from ml_collections import ConfigDict

from configs import qwen2_5_vl_7b_aepo, qwen2_5_vl_7b_cold_start
from data_pipeline.packing import leaf_runs, plan_batches, shapes
from data_pipeline.prompts import Prompt
from data_pipeline.tree_layout import tree_layout
from data_pipeline.tree_segments import tree_segment

_CHIPS, _LONGEST = 8, 16_384


def tree(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Returns the sizes of a tree's runs of leaves (`leaf_runs`), and its patches."""
    length = int(np.clip(rng.lognormal(np.log(1000), 0.5), 200, 4096))
    around = rng.lognormal(np.log(2000), 0.8)
    responses: list[np.ndarray] = []
    parents, starts = [], []
    for leaf in range(8):
        parent = int(rng.integers(4)) if leaf >= 4 and rng.random() < 0.7 else -1
        start = int(rng.integers(1, len(responses[parent]))) if parent >= 0 else 0
        end = int(np.clip(around * rng.lognormal(0, 0.5), start + 30, _LONGEST))
        responses.append(np.zeros(max(end, start + 1), np.int32))
        parents.append(parent)
        starts.append(start)
    layout = tree_layout(parents, starts, [len(response) for response in responses])
    empty = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
    prompt = Prompt("", "", "", "", "", np.zeros(length, np.int32), *empty, np.zeros((3, length), np.int32), 0)
    return leaf_runs(tree_segment(prompt, np.zeros(len(layout.first_leaf), np.int32), *layout[2:], {})), 3 * length


def sequence(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Returns the same of a prompt with its teacher's response."""
    length = int(np.clip(rng.lognormal(np.log(1000), 0.5), 200, 4096))
    response = int(np.clip(rng.lognormal(np.log(2700), 0.9), 50, _LONGEST))
    return np.array([[0, length + response], [0, 0]]), 3 * length


def line(name: str, drawn: list[list[tuple[np.ndarray, int]]], packing: ConfigDict, halvings: int) -> str:
    padding, twice, seconds, micro_batches = [], [], [], []
    choices = shapes(packing.rows or _CHIPS, packing.row_tokens, packing.row_patches, halvings=halvings, parts=_CHIPS)
    for update in drawn:
        sizes, patches = zip(*update, strict=True)
        begin = time.perf_counter()
        made, plan = plan_batches(sizes, patches, choices)
        seconds.append(time.perf_counter() - begin)
        slots = sum(shape.rows * shape.row_tokens for shape in made)
        used = sum(int(sizes[i][start, stop]) for row in plan for i, start, stop in row)
        distinct = sum(int(size[0, -1]) for size in sizes)
        padding.append(1 - used / slots)
        twice.append((used - distinct) / slots)
        micro_batches.append(len(made))
    return (
        f"| {name} | {halvings} | {np.mean(micro_batches):.1f} | {np.mean(padding):.1%} | {max(padding):.1%} | "
        f"{np.mean(twice):.1%} | {1e3 * np.mean(seconds):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args()
    print(
        "| update | halvings | micro-batches | padding | most | computed twice | ms to plan |\n|---|---|---|---|---|---|---|"
    )
    for name, make, count, module in (
        ("AEPO, 128 trees of 8 leaves", tree, 128, qwen2_5_vl_7b_aepo),
        ("fine-tuning, 256 responses", sequence, 256, qwen2_5_vl_7b_cold_start),
    ):
        packing = module.get_config().packing
        drawn = []
        for seed in range(arguments.updates):
            rng = np.random.default_rng(seed)
            drawn.append([make(rng) for _ in range(count)])
        for halvings in range(4):
            print(line(name, drawn, packing, halvings), flush=True)


if __name__ == "__main__":
    main()
