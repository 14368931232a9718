"""The kernels of adaptive exploration: exact token entropy where tokens are drawn and where they are learned from.

Each has Pallas versions for TPU and GPU and a plain-XLA twin behind one `implementation=` switch (`implementations.chosen`
has the rule). Nothing here knows `ares_jax`.
"""

from kernels.log_probs import token_log_probs_and_entropy
from kernels.sampling import sample_with_entropy
from kernels.window import WindowRing, window_means, window_push, window_ring_init, window_step

__all__ = [
    "WindowRing",
    "sample_with_entropy",
    "token_log_probs_and_entropy",
    "window_means",
    "window_push",
    "window_ring_init",
    "window_step",
]
