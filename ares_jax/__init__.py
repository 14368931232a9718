"""ARES in JAX: adaptive multimodal reasoning, from cold start to entropy-shaped reinforcement learning."""

import itertools
import os
import sys
from pathlib import Path

__version__ = "0.1.0"

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would tell every user that PyTorch is not there


def _is_command() -> bool:
    """Returns whether Python was started as one of our commands."""
    program = sys.argv[0] if sys.argv else ""
    if program != "-m":  # else the module is being looked for
        return Path(program).name == "ares-jax"
    pairs = itertools.pairwise(sys.orig_argv)
    return any(option.endswith("m") and name.partition(".")[0] == __name__ for option, name in pairs)


def show_torch() -> None:
    """Ends what is said below: a command calls it once its own imports are over."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]


# transformers and tensorboardX import PyTorch wherever they find it, which no command uses: half of a start-up, and 300 MB.
# So while a command's modules are imported there is none. No longer: SciPy uses what it finds in `sys.modules`.
if _is_command():
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
