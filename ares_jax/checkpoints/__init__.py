"""Weights on disk: Hugging Face folders, the same in Orbax, and training checkpoints."""

from ares_jax.checkpoints.huggingface import load_hf, save_hf
from ares_jax.checkpoints.orbax_params import load_orbax

__all__ = ["load_hf", "load_orbax", "save_hf"]
