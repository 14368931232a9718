"""What every command needs of a run: tokenizer, prompts, problems, the model and the newest weights of each stage."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from data_pipeline import sources, tokenizer
from data_pipeline.prompts import PromptEncoder
from flax import nnx
from ml_collections import ConfigDict

from ares_jax.aepo.trigger_words import trigger_mask
from ares_jax.checkpoints import load_hf
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.checkpoints.params import to_flat
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, TextConfig, VisionConfig
