"""The sampler's engine: paged cache, continuous batching, branch-point rollouts."""

from ares_jax.sampling.engine import Engine
from ares_jax.sampling.options import EngineOptions
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory

__all__ = ["Engine", "EngineOptions", "RolloutTree", "RolloutRequest", "Trajectory"]
