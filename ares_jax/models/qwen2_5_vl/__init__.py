"""Qwen2.5-VL (arXiv 2502.13923): vision tower and text decoder."""

from ares_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.models.qwen2_5_vl.model import Qwen25VL
from ares_jax.models.qwen2_5_vl.vision import VisionInputs

__all__ = ["Qwen25VL", "Qwen25VLConfig", "TextConfig", "VisionConfig", "VisionInputs"]
