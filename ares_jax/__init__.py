"""ARES in JAX: adaptive multimodal reasoning, from cold start to entropy-shaped reinforcement learning."""

import itertools
import os
import sys
from pathlib import Path

__version__ = "0.1.0"

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would tell every user that PyTorch is not there


def _is_command() -> bool:
    """Returns whether this process is one of our commands, or a worker that one has started."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # its module is being looked for
        pairs = itertools.pairwise(sys.orig_argv)
        return any(option.endswith("m") and name.partition(".")[0] == __name__ for option, name in pairs)
    return Path(program).name.startswith("ares-jax") or Path(program).is_relative_to(Path(__file__).parent)


# transformers imports PyTorch wherever it finds it, which none of our commands uses: half of their start-up, and 300 MB.
if _is_command():
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
