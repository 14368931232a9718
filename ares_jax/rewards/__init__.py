"""What an answer is worth: rules and a verifier that grade it."""

from ares_jax.rewards.grading import is_correct

__all__ = ["is_correct"]
