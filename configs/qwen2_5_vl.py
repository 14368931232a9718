"""Both stages of ARES on Qwen2.5-VL with the paper's numbers (method.md, sections 4 and 5), for a v5p-16: 8 chips, or more.

`python -m ares_jax.plan` says whether a slice, a mesh, a remat policy and `packing.rows` fit.
Before a run say where the weights and the problems are: `--config.model.pretrained=`, `--config.data.train=`, ...
"""

from ml_collections import ConfigDict

from ares_jax.config import default_config
from configs.methods import with_method


def _both(shape: str) -> ConfigDict:
    c = default_config()
    # Parameters are bfloat16 wherever they are used; stored so, an update of 1e-6 would be rounded away.
    c.model.update(shape=shape, dtype="bfloat16", param_dtype="float32", remat="full")
    c.mesh.update(data=1, fsdp=-1, sequence=1, tensor=1)
    with c.unlocked():
        c.data.update(
            train=("jsonl://data/train.jsonl",), validation=("jsonl://data/validation.jsonl",),
            test=("jsonl://data/test.jsonl",), format_prompt="configs/formats/think_then_box.jinja",
            min_pixels=262_144, max_pixels=4_194_304, workers=8,
        )  # fmt: skip
        # A row for every part of data x fsdp. A prompt of 4096 tokens has at most 16,384 patches: four such fit in a row.
        c.packing.update(rows=0, row_tokens=32_768, row_patches=65_536)
        c.sampler.update(
            max_prompt_tokens=4096, max_response_tokens=16_384, max_prompt_patches=16_384, temperature=1.0, top_p=0.99,
            slots=64, prefill_batch=4, page_size=64, pages=8192,  # a group of 8 of the longest answers takes 2,120 pages
        )  # fmt: skip
        c.optimizer.update(weight_decay=0.01, clip_norm=1.0)
        c.evaluation.temperature = 0.5
    return c


def cold_start(shape: str) -> ConfigDict:
    """Returns the supervised stage for the published shape "3b", "7b", "32b" or "72b"."""
    c = _both(shape)
    c.cold_start.update(pass_rate_samples=8, epochs=2, batch_size=256, learning_rate=2e-5)
    return c


def aepo(shape: str, method: str = "aepo") -> ConfigDict:
    """Returns the reinforcement-learning stage, by a method of configs/methods.py, in the folder of the cold start."""
    c = _both(shape)
    c.aepo.update(
        prompts_per_step=512, group_size=8, minibatches=4, learning_rate=1e-6, warmup_steps=0,  # 4 updates of 128 prompts
        window=4, clip_low=0.2, clip_high=0.3, clip_dual=3.0, reduction="token", importance_cap=2.0,
    )  # fmt: skip
    return with_method(c, method)
