"""The demo: arithmetic over real handwritten digits, a real but tiny Qwen2.5-VL, two CPU cores, some ten minutes."""

from ares_jax.config import default_config
from configs.methods import with_method


def get_config(method: str = "aepo"):
    """`method`: one of configs/methods.py."""
    c = default_config()
    with c.unlocked():
        c.model.update(dtype="float32", remat="none")
        # With 16 rotary pairs the published sections and base would leave the width no frequency that tells cards apart.
        c.model.text.update(num_layers=3, mrope_section=(2, 4, 10), rope_theta=100.0)
        c.data.update(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
        c.sampler.update(
            slots=256, page_size=16, pages=4096, max_prompt_tokens=64, max_prompt_patches=48, max_response_tokens=128
        )
        # Fine-tuning all at once lets the young decoder wash out what the vision tower has just learned.
        c.optimizer.freeze_vision = True
        # Shorter rows cut most trees, longer ones cost more attention than they save.
        c.packing.update(rows=4, row_tokens=352, row_patches=136, halvings=2)
        c.cold_start.update(
            alignment_steps=300,
            warmup_steps=240,
            warmup_learning_rate=2e-3,
            pass_rate_problems=1536,
            selected=1024,
            epochs=5,
            batch_size=64,
            learning_rate=1e-3,
        )
        c.aepo.update(
            steps=40,
            prompts_per_step=32,
            learning_rate=1e-4,
            minibatches=1,
            # On-policy: with `sampler.one_shape` a killed run ends as one that was not. 1 is a fifth faster (RESULTS).
            staleness=0,
            save_every=10,
            validate_every=10,
            log_rollouts_every=5,
            # A tiny model's entropy is low nearly everywhere: the window quantile finds the few places that are not.
            tau_definition="window_median",
            # Long enough to reach from an ordinal to the value after it: with 4 easy problems take more tokens (RESULTS).
            window=6,
            # At 0.95 only 8 % of the leaves were branches; at 0.8 a quarter, and fewer tokens a leaf.
            tau_quantile=0.8,
            tau_decay=0.9,
            entropy_bonus=0.3,
            # The released reward pays wrong answers for exploring: it taught long wrong answers (benchmarks/RESULTS.md).
            shaping="paper",
        )
    return with_method(c, method)
