"""One formula for host and device: NumPy for NumPy inputs, JAX for JAX inputs."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*arrays: Any) -> ModuleType:
    """Returns `jax.numpy` if any of `arrays` is a JAX array (or a tracer), else `numpy`.

    Leaves differ in length, and on the host JAX would compile each operation anew for each length.
    """
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np
