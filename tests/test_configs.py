"""The shipped configs hold the paper's numbers (method.md, sections 4 and 5)."""

import importlib
import math
import re
from pathlib import Path

import pytest

from ares_jax.parallel.micro_batch import check_rows, share_of


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_numbers_of_the_paper(size):
    rl, tuning = (
        importlib.import_module(f"configs.qwen2_5_vl_{size}_{stage}").get_config() for stage in ("aepo", "cold_start")
    )
    a, s, o, d = rl.aepo, rl.sampler, rl.optimizer, rl.data
    assert (a.prompts_per_step, a.group_size, a.prompts_per_step // a.minibatches) == (512, 8, 128)
    assert (s.temperature, s.top_p, s.max_prompt_tokens, s.max_response_tokens) == (1.0, 0.99, 4096, 16_384)
    assert (a.learning_rate, o.weight_decay, a.warmup_steps, o.clip_norm) == (1e-6, 0.01, 0, 1.0)
    assert (d.min_pixels, d.max_pixels, rl.model.dtype, rl.evaluation.temperature) == (262_144, 4_194_304, "bfloat16", 0.5)
    assert (a.clip_low, a.clip_high, a.clip_dual, a.window, a.importance_cap) == (0.2, 0.3, 3.0, 4, 2.0)
    k = tuning.cold_start
    assert (k.pass_rate_samples, k.epochs, k.batch_size, k.learning_rate) == (8, 2, 256, 2e-5)
    assert tuning.packing.row_tokens == 32_768 and rl.model.shape == tuning.model.shape == size
    # The longest tree of a group may be cut, a leaf with its prompt may not.
    assert rl.packing.row_tokens >= s.max_prompt_tokens + s.max_response_tokens


def named_slices():
    """Returns the (chips, hosts) of every slice that the guides and launchers name: four chips a host."""
    text = "".join(path.read_text() for path in [*Path("docs").glob("*.md"), *Path("launch").glob("*.sh")])
    counts = {math.prod(map(int, shape.split("x"))) for shape in re.findall(r"\b(?:v\d\w+|slice):(\d+(?:x\d+)+)", text)}
    counts |= {int(cores) // 2 for cores in re.findall(r"--type=v5p-(\d+)", text)}
    return [(chips, chips // 4) for chips in sorted(counts)]


@pytest.mark.parametrize("stage", ["cold_start", "aepo"])
@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_batches_can_be_split_over_every_slice_that_a_guide_names(size, stage):
    config = importlib.import_module(f"configs.qwen2_5_vl_{size}_{stage}").get_config()
    assert {(64, 16), (128, 32), (512, 128)} <= set(named_slices())
    for chips, hosts in [(1, 1), (8, 1), *named_slices()]:
        check_rows(config, chips, hosts)
        share_of(config.cold_start.batch_size, "cold_start.batch_size", hosts)
