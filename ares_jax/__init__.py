"""ARES in JAX: adaptive multimodal reasoning, from cold start to entropy-shaped reinforcement learning."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would tell every user that PyTorch is not there
