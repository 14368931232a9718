"""Weights on disk: Hugging Face folders, and Orbax training checkpoints."""

from ares_jax.checkpoints.huggingface import load_hf, save_hf

__all__ = ["load_hf", "save_hf"]
