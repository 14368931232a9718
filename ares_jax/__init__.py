"""ARES in JAX: adaptive multimodal reasoning, from cold start to entropy-shaped reinforcement learning."""
