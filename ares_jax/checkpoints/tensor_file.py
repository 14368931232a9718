"""A safetensors file, here or in a bucket: what it holds, and its tensors one by one. Nothing is mapped into memory.

The format (huggingface.co/docs/safetensors): the length of the header, 8 bytes little-endian; the header, JSON; the tensors.
The header is read here, so that a file cut short names the first tensor it lost, and one in a bucket is read by ranges.
"""

import json
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from ares_jax.checkpoints.folders import is_remote
from ares_jax.errors import UserError

_DTYPES = {name: np.dtype(dtype) for name, dtype in
           {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "F64": np.float64}.items()}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes: the library's own limit


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in the file, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    end: int


class TensorFile:
    """`parts` are its tensors, in the order of their bytes. Reading is safe from several threads."""

    def __init__(self, file: epath.Path):
        """Raises `UserError` if it is truncated or no safetensors; it names the first tensor that is not whole."""
        self._file = file
        self.parts = _parts(file)
        if not is_remote(file):
            try:
                self._local = safe_open(file, framework="np", backend="pread")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({error}); copy it again") from None

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor. Raises `OSError` or `SafetensorError` if that fails."""
        return self.rows(name, 0, None) if is_remote(self._file) else self._local.get_tensor(name)

    def rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Returns the rows `start` to `stop` - 1 of a tensor (without `stop`, to its end). Raises as `read` does."""
        if not is_remote(self._file):
            return self._local.get_slice(name)[start:stop]
        part = self.parts[name]
        row = (part.end - part.begin) // part.shape[0]
        begin, end = part.begin + start * row, part.end if stop is None else part.begin + stop * row
        with self._file.open("rb") as opened:
            opened.seek(begin)
            data = opened.read(end - begin)
        if len(data) != end - begin:
            raise OSError(f"{len(data):,} bytes of {end - begin:,}")
        return np.frombuffer(data, part.dtype).reshape(-1, *part.shape[1:])


def _parts(file: epath.Path) -> dict[str, Part]:
    try:
        size = file.stat().length
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        parts = {}
        for name, tensor in order:
            if tensor["dtype"] not in _DTYPES:
                raise UserError(f"{file}: tensor {name} is {tensor['dtype']}; only {', '.join(_DTYPES)} are read")
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            parts[name] = Part(tuple(tensor["shape"]), _DTYPES[tensor["dtype"]], begin, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it is truncated or no safetensors, copy it again") from None
    for name, part in parts.items():
        if part.end > size:
            raise UserError(
                f"{file}: cannot be read (truncated at byte {size:,}: tensor {name} ends at {part.end:,}); copy it again"
            )
        if part.end - part.begin != math.prod(part.shape) * part.dtype.itemsize:
            raise UserError(f"{file}: cannot be read (tensor {name} has {part.end - part.begin:,} bytes); copy it again")
    return parts
