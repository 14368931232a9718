"""Whether two checkpoints hold the same tensors, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ares_jax.checkpoints.weights import WORKERS, Weights
from ares_jax.errors import UserError


def verify(source: Weights, target: Weights) -> int:
    """Compares every tensor and returns how many there are. The key layouts may differ.

    Raises:
      UserError: names the first tensor that differs, or that only one of them has.
    """
    a, b = source.by_new_name, target.by_new_name
    for name in [*a, *b]:
        if name not in a or name not in b:
            raise UserError(f"tensor {name} is in {(source if name in a else target).where} only; convert again")
    budget = source.budget()
    pool = ThreadPoolExecutor(WORKERS)

    def compare(name: str) -> str | None:
        with budget.take(source.entries[a[name]].nbytes):
            return _difference(source.read(a[name]), target.read(b[name]), name)

    try:
        for problem in pool.map(compare, a):
            if problem:
                raise UserError(f"{problem}, between {source.where} and {target.where}; convert again")
    finally:
        pool.shutdown(cancel_futures=True)
    return len(a)


def _difference(x: np.ndarray, y: np.ndarray, name: str) -> str | None:
    if x.dtype != y.dtype or x.shape != y.shape:
        return f"tensor {name} differs: {x.dtype} {x.shape} and {y.dtype} {y.shape}"
    bits = f"u{x.dtype.itemsize}"  # as integers: a NaN equals itself, and -0 is not 0
    a, b = x.reshape(-1).view(bits), y.reshape(-1).view(bits)
    for start in range(0, a.size, 1 << 22):
        different = np.flatnonzero(a[start : start + (1 << 22)] != b[start : start + (1 << 22)])
        if different.size:
            index = tuple(int(i) for i in np.unravel_index(start + different[0], x.shape))
            return f"tensor {name} differs, first at {index}: {x[index]} and {y[index]}"
    return None
