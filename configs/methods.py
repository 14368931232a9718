"""Named methods: the fields of `config.aepo` in which each differs from a config's own.

A config file that takes one is given its name after a colon, `--config=configs/digits_cpu.py:dapo`; flags still override.
`dapo` is arXiv 2503.14476: two clip bounds and no dual clip (a bound that no ratio reaches), the mean over tokens, prompts
drawn anew until every group has right and wrong answers (online filtering), no KL. Its penalty on overlong answers depends
on the limit: aepo.overlong_buffer, a fifth of sampler.max_response_tokens there.
"""

from ml_collections import ConfigDict

from ares_jax.errors import UserError

_PLAIN = {"root_leaves": 8, "shaping": "none", "entropy_bonus": 0.0, "kl.dynamic": False}  # of 8: no branching
_GRPO = {"tree": "leaf", "scale": "group"}
METHODS = {
    "aepo": {},
    "entropy_shaping": {"root_leaves": 8},
    "dynamic_kl": {**_PLAIN, "kl.dynamic": True},
    "grpo": {**_PLAIN, **_GRPO},
    "rloo": {**_PLAIN, "tree": "local", "scale": "none"},
    "dapo": {
        **_PLAIN, **_GRPO, "kl.weight": 0.0, "clip_low": 0.2, "clip_high": 0.28, "clip_dual": 1e9,
        "reduction": "token", "filter.low": 0.01, "filter.high": 0.99,
    },
}  # fmt: skip


def with_method(config: ConfigDict, name: str) -> ConfigDict:
    """Returns `config`, changed in place to the method. Raises `UserError` for one that is not in `METHODS`."""
    if name not in METHODS:
        raise UserError(f"method {name!r} is not one of {', '.join(METHODS)}")
    config.aepo.update_from_flattened_dict(METHODS[name])
    return config
