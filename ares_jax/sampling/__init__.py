"""The sampler's engine: paged cache, continuous batching, branch-point rollouts."""

from ares_jax.sampling.engine import Engine
from ares_jax.sampling.options import EngineOptions
from ares_jax.sampling.trajectory import RolloutGroup, RolloutRequest, Trajectory

__all__ = ["Engine", "EngineOptions", "RolloutGroup", "RolloutRequest", "Trajectory"]
