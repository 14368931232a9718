"""`python -m benchmarks.convert`: peak memory and time of the conversion on synthetic checkpoints of the 3B model's widths.

Each command runs in a process of its own; its peak is the kernel's `ru_maxrss`. "Beyond start" is that minus the peak of the
same command on a checkpoint of a few kilobytes (Python, JAX and Orbax themselves). The export of a training step, float32 on
disk and written as bfloat16 chunk by chunk, is of the smallest: making one holds the model twice. Prints the table for
`RESULTS.md`.
"""

import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath

from ares_jax.checkpoints.huggingface import write_config, write_hf
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.checkpoints.names import slots
from ares_jax.checkpoints.weights import Entry, Weights
from ares_jax.config import default_config
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from data_pipeline import digits, tokenizer

_LAYERS = flags.DEFINE_list("layers", ["8", "24"], "text layers of each checkpoint; 24 are 4.6 GB")
_SHARD = flags.DEFINE_string("shard", "1GB", "shard limit")
_FOLDER = flags.DEFINE_string("folder", None, "where to write, about three times the largest checkpoint; by default /tmp")

STEP = "training step to HF"
TINY = Qwen25VLConfig(TextConfig(512, 32, 64, 1, 4, 2, (1, 1, 2)), VisionConfig(32, 64, 1, 2, (0,)), 1, 2, 3, 4)


def config(layers: int) -> Qwen25VLConfig:
    """The 3B model with fewer layers."""
    text = TextConfig(151_936, 2048, 11_008, layers, 16, 2, (16, 24, 24))
    return Qwen25VLConfig(text, VisionConfig(1280, 3420, 4, 16, (3,)), 151_655, 151_656, 151_652, 151_653)


class RandomWeights(Weights):
    """Normal bf16 numbers, as compressible as real ones are."""

    def __init__(self, shape: Qwen25VLConfig):
        entries = {name: Entry(slot.shape, np.dtype(jnp.bfloat16)) for name, slot in slots(shape).items()}
        super().__init__("random", shape, entries)

    def read(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(abs(hash(name)))
        return rng.standard_normal(self.entries[name].shape, np.float32).astype(jnp.bfloat16)


def make_checkpoint(folder: Path, shape: Qwen25VLConfig, shard: str) -> None:
    """Writes a Hugging Face folder of random weights."""
    folder.mkdir(parents=True)
    weights = RandomWeights(shape)
    write_hf(weights, epath.Path(folder), shard)
    write_config(epath.Path(folder), weights)


def make_step(folder: Path) -> None:
    """Writes a run from `folder/hf` with one training step of random float32 parameters, as its learner saves them."""
    config = default_config()  # computes in bfloat16, as the configs of 3B and 7B: the export is rounded
    config.model.pretrained = str(folder / "hf")
    tokenizer.train_tokenizer(digits.corpus(), 448).save_pretrained(folder / "hf")
    tokenizer.make_image_processor(784, 784).save_pretrained(folder / "hf")
    (folder / "run").mkdir()
    shapes = to_flat(open_run(config, folder / "run").model)
    some = np.random.default_rng(0).standard_normal(10_000_019, np.float32)
    checkpoints = Checkpoints(folder / "run" / "checkpoints" / "aepo")
    checkpoints.save(1, {name: np.resize(some, value.shape) for name, value in shapes.items()}, {"m": np.zeros(2)}, {})
    checkpoints.close()


def measure(*arguments: str) -> tuple[float, float]:
    """Runs `ares_jax.convert`; returns its peak memory in MB and its time in seconds."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-m", "ares_jax.convert", *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} failed")
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - start


def convert_all_ways(
    folder: Path, shape: Qwen25VLConfig, *, with_step: bool
) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """Returns peak and time of every command, and [total, largest shard, largest tensor] of the safetensors in MB."""
    # In another process: the kernel starts a child's `ru_maxrss` at its parent's size.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make_checkpoint, (folder / "hf", shape, _SHARD.value))
    shards = [file.stat().st_size for file in (folder / "hf").glob("*.safetensors")]
    largest = max(entry.nbytes for entry in RandomWeights(shape).entries.values())
    sizes = [sum(shards) / 1e6, max(shards) / 1e6, largest / 1e6]
    there = ["--from=hf", "--to=orbax", f"--source={folder}/hf", f"--target={folder}/orbax"]
    back = ["--from=orbax", "--to=hf", f"--source={folder}/orbax", f"--target={folder}/back"]
    results = {
        "HF to Orbax": measure(*there),
        "Orbax to HF": measure(*back),
        "verify": measure(*back, "--verify"),
    }
    if with_step:
        shutil.rmtree(folder / "back")  # room for the step
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_step, (folder,))
        run = [f"--config=configs/resolved.py:{folder}/run/config.json", f"--workdir={folder}/run"]
        results[STEP] = measure(*run, f"--max_shard_size={_SHARD.value}")
    return results, sizes


def main(_) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="ares_convert_", dir=_FOLDER.value) as name:
        start, _ = convert_all_ways(Path(name) / "tiny", TINY, with_step=True)
        smallest = min(map(int, _LAYERS.value))
        for layers in map(int, _LAYERS.value):
            with tempfile.TemporaryDirectory(dir=name) as inner:
                results, (total, shard, tensor) = convert_all_ways(Path(inner), config(layers), with_step=layers == smallest)
            for command, (peak, seconds) in results.items():
                rows.append((total, command, shard, tensor, 1.5 * shard + tensor, peak, peak - start[command][0], seconds))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; MB, seconds\n")
    print("| checkpoint | command | largest shard | largest tensor | bound | peak memory | beyond start | time |")
    print("|---|---|---|---|---|---|---|---|")
    for total, command, shard, tensor, bound, peak, beyond, seconds in rows:
        print(
            f"| {total:,.0f} | {command} | {shard:,.0f} | {tensor:,.0f} | {bound:,.0f} | {peak:,.0f} | {beyond:,.0f} "
            f"| {seconds:.0f} |"
        )
    if any(peak > bound for *_, bound, peak, _, _ in rows):
        raise SystemExit("peak memory is above its bound")


if __name__ == "__main__":
    app.run(main)
