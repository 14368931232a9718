"""What AEPO cannot run with, said before the first tokens are drawn."""

from ml_collections import ConfigDict

from ares_jax.aepo.advantage import ADVANTAGES
from ares_jax.aepo.batch import SCALES
from ares_jax.aepo.difficulty import RULES
from ares_jax.aepo.filtering import FILTERS
from ares_jax.aepo.kl import ESTIMATORS
from ares_jax.errors import UserError
from ares_jax.run.samplers import colocated
from ares_jax.sampling.branching import BRANCH_AT, BRANCH_CHOICES, is_causal
from data_pipeline.packing import PATCHES_PER_TOKEN

_CHOICES = {
    "tau_definition": ("trajectory", "window_median"), "difficulty_rule": tuple(RULES),
    "shaping": ("released", "paper", "none"), "tree": tuple(ADVANTAGES), "scale": SCALES, "branch_at": BRANCH_AT,
    "branch_choice": BRANCH_CHOICES, "filter.by": FILTERS,
    "reduction": ("token", "seq"), "old_log_probs": ("sampler", "recomputed"),
    "kl.estimator": ESTIMATORS, "kl.reference": ("device", "host"), "staleness": (0, 1),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises `UserError` where AEPO cannot run as configured: before the first tokens are drawn, not after."""
    a, s, p = config.aepo, config.sampler, config.packing
    values = {**a, **{f"{part}.{name}": value for part in ("kl", "filter") for name, value in a[part].items()}}
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"aepo.{name}={values[name]!r} is not one of {', '.join(map(str, choices))}")
    if a.staleness and s.tensor > 1 and colocated(config):
        # Two threads would start programs of several chips, in any order on each; and sharing chips, neither is faster.
        raise UserError(
            f"aepo.staleness={a.staleness}: a colocated sampler over sampler.tensor={s.tensor} devices can only draw while "
            "the learner does not learn; set aepo.staleness=0"
        )
    if not 1 <= a.root_leaves <= a.group_size:
        raise UserError(f"aepo.root_leaves={a.root_leaves}: a group has {a.group_size} leaves; give 1 to {a.group_size}")
    if a.tree == "split" and a.root_leaves < a.group_size and not is_causal(a.branch_at, a.branch_choice):
        raise UserError(
            f"aepo.tree='split' with aepo.branch_at={a.branch_at!r}, aepo.branch_choice={a.branch_choice!r}: a fork chosen "
            "by what the parent drew next has no fresh sample in its parent, and the gradient would be biased; take "
            "'window_end' and 'first', or aepo.tree='local'"
        )
    if a.tree in ("split", "local") and a.root_leaves < 2:
        raise UserError(
            f"aepo.root_leaves={a.root_leaves}: aepo.tree={a.tree!r} compares a root with the other first roots; give at "
            "least 2, or take aepo.tree='subtree'"
        )
    if (longest := s.max_prompt_tokens + s.max_response_tokens) > p.row_tokens:
        raise UserError(
            f"packing.row_tokens={p.row_tokens}: a prompt and its response may have {longest}; raise it, or lower "
            "sampler.max_response_tokens or max_prompt_tokens"
        )
    if s.max_prompt_patches > p.row_patches or p.row_patches % PATCHES_PER_TOKEN:
        raise UserError(
            f"packing.row_patches={p.row_patches}: a prompt may have {s.max_prompt_patches}; raise it to a multiple of "
            f"{PATCHES_PER_TOKEN}, or lower sampler.max_prompt_patches"
        )
