"""What a rollout weighs on the wire and in the learner's memory: frames of pixels beside JSON with patches, as it was.

    python -m benchmarks.wire

A request of one image of 16,384 patches, as photographs go (smooth, with some noise) and at worst (noise); the answer, a
tree of 8 leaves of 1,000 tokens, two of them branches; and what 512 prompts hold. Times are the best of 20.
"""

import json
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory, tree_of
from ares_jax.service import frame
from ares_jax.service.protocol import (
    encode_group,
    encode_request,
    frame_requests,
    frame_tree,
    unframe_requests,
    unframe_tree,
)
from data_pipeline.pixels import PixelPatches, pixel_patches, value_table
from data_pipeline.videos import RAW

_SIDE, _REPEATS, _PROMPTS = 128 * 14, 20, 512  # 128 x 128 patches
_MIB = 2**20


def picture(rng: np.random.Generator, side: int, noise: float) -> UInt8[np.ndarray, "H W 3"]:
    """Returns slow waves with noise of so many grey levels; infinitely many: noise alone."""
    if np.isinf(noise):
        return rng.integers(0, 256, (side, side, 3), np.uint8)
    y, x = np.mgrid[:side, :side] / side
    waves = sum(np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(0, 4, (6, 3)))
    grey = 128 + 20 * waves[..., None] + rng.normal(0, noise, (side, side, 3))
    return np.clip(grey, 0, 255).astype(np.uint8)


def request(processor, image: UInt8[np.ndarray, "H W 3"]) -> tuple[RolloutRequest, np.ndarray]:
    """Returns a request with an image, and the patches that the processor itself makes of it."""
    shown = processor([image], return_tensors="np", input_data_format="channels_last", **RAW)
    values, count = shown["pixel_values"], len(shown["pixel_values"])
    pixels = values.reshape(count, 3, processor.temporal_patch_size, -1)[:, :, :1].astype(np.uint8)
    patches = pixel_patches([pixels], value_table(processor), values.shape[1])
    tokens = np.zeros(count // 4 + 20, np.int32)
    asked = RolloutRequest(
        "p", tokens, patches, shown["image_grid_thw"].astype(np.int32), np.zeros((3, len(tokens)), np.int32), 0, 0, 8, 4, 2,
        1.0, "window_end", "first", 1.0, 1.0, 0, 1000,
    )  # fmt: skip
    return asked, processor([image], return_tensors="np", input_data_format="channels_last")["pixel_values"]


def tree(rng: np.random.Generator) -> RolloutTree:
    leaves: list[Trajectory] = []
    for number in range(8):
        parent, start, n = (0, 500, 1000) if number > 5 else (-1, 0, 1000)
        columns = [rng.integers(0, 150_000, n, np.int32), *(rng.random(n, np.float32) for _ in range(3))]
        columns += [rng.random(n) < 0.1, np.zeros(n, np.int32)]
        if parent >= 0:
            for mine, first in zip(columns, vars(leaves[0]).values(), strict=False):
                mine[:start] = first[:start]
        leaves.append(Trajectory(*columns, parent, start, "stop"))
    return tree_of("p", leaves, prompt_tokens=4096, window=4)


def best(f: Callable[[], object]) -> float:
    """Returns the milliseconds of the fastest call."""
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=_SIDE**2)
    print("| a request with an image of 16,384 patches | MiB | of its uint8 pixels | encode and decode, ms | cut, ms |")
    print("|---|---|---|---|---|")
    pixels = 3 * _SIDE**2
    for name, noise in (("like a photograph", 4.0), ("noise alone", np.inf)):
        asked, patches = request(processor, picture(rng, _SIDE, noise))
        assert isinstance(asked.patches, PixelPatches)
        np.testing.assert_array_equal(np.asarray(asked.patches), patches)  # what the model sees, to the bit
        data = frame_requests([asked])
        both = best(lambda data=data, asked=asked: unframe_requests(frame_requests([asked])))
        cut = best(lambda asked=asked: np.asarray(asked.patches))
        print(f"| {name}, a frame | {len(data) / _MIB:.2f} | {len(data) / pixels:.3f} | {both:.1f} | {cut:.1f} |")
    old = json.dumps({"groups": [encode_request(asked)]}).encode()
    print(f"| JSON with patches, as it was | {len(old) / _MIB:.2f} | {len(old) / pixels:.3f} | | |")

    answer = tree(rng)
    framed, lines = frame_tree(0, answer), json.dumps({"index": 0, "group": encode_group(answer)}).encode()
    took = best(lambda: unframe_tree(*frame.decode(frame_tree(0, answer)))), best(
        lambda: json.loads(json.dumps({"index": 0, "group": encode_group(answer)}))
    )
    print("\n| a tree of 8 leaves of 1,000 tokens, two branches | bytes, KiB | encode and decode, ms |\n|---|---|---|")
    print(f"| a frame | {len(framed) / 1024:.0f} | {took[0]:.2f} |")
    print(f"| JSON, decoded without its arrays | {len(lines) / 1024:.0f} | {took[1]:.2f} |")

    print(f"\n| {_PROMPTS} prompts with an image | pixels, MiB | held, MiB | as float32 patches, MiB |\n|---|---|---|---|")
    kinds = (("112 x 112", 112, 4.0), ("448 x 448, like a photograph", 448, 4.0), ("448 x 448, noise alone", 448, np.inf))
    for name, side, noise in kinds:
        held = [request(processor, picture(rng, side, noise))[0].patches for _ in range(8)]
        share = _PROMPTS / len(held) / _MIB
        print(
            f"| {name} | {3 * side**2 * _PROMPTS / _MIB:.0f} | {sum(p.nbytes for p in held) * share:.0f} | "
            f"{sum(4 * p.shape[0] * p.shape[1] for p in held) * share:.0f} |"
        )


if __name__ == "__main__":
    main()
