"""What the kernel counts: the export of a training checkpoint does not hold the model."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from configs import digits_cpu

EXPORT = """
import json, resource, sys
from pathlib import Path
from absl import flags
from absl.testing import flagsaver
from ares_jax.commands import convert
from configs import resolved
flags.FLAGS.mark_as_parsed()
peaks = []
for run in sys.argv[1:]:
    with flagsaver.flagsaver(max_shard_size="24MB", verify=True):
        convert.main(resolved.get_config(f"{run}/config.json"), Path(run))
    peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


def make_run(folder, hidden, layers, section) -> int:
    """Makes a run with one checkpoint; returns the bytes of its parameters."""
    config = digits_cpu.get_config()
    config.model.text.update(num_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, mrope_section=section)
    folder.mkdir()
    shapes = to_flat(open_run(config, folder).model)
    some = np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # too long for a compressor to see it again
    params = {name: np.resize(some, shape.shape) for name, shape in shapes.items()}
    manager = Checkpoints(folder / "checkpoints" / "aepo")
    manager.save(1, params, {"m": jnp.zeros(2)}, {})
    manager.close()
    return sum(value.nbytes for value in params.values())


def test_a_larger_run_takes_hardly_more_memory(tmp_path):
    make_run(tmp_path / "tiny", 64, 2, (2, 3, 3))
    size = make_run(tmp_path / "large", 512, 24, (16, 24, 24))
    runs = [tmp_path / "tiny", tmp_path / "large"]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *map(str, runs)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    start, peak = json.loads(done.stdout.splitlines()[-1])
    # A shard and a half and a tensor are 40 MB, TensorStore's cache of chunks 100 MB; the parameters are 380 MB.
    assert peak - start < 0.5 * size and size > 350e6, (start, peak, size)
