"""Weights for a sampler: out of a request's body, or out of a file or checkpoint below folders that the service allows."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.numpy import bfloat16
from safetensors import SafetensorError, deserialize, safe_open

from ares_jax.checkpoints.folders import is_remote
from ares_jax.checkpoints.orbax_params import PARAMS
from ares_jax.errors import UserError
from ares_jax.params import check_flat

_DTYPES = {"F32": np.float32, "BF16": bfloat16, "F16": np.float16, "F64": np.float64}


def from_bytes(body: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file. Raises `UserError` if it is none, or holds other types than floats."""
    try:
        tensors = deserialize(body)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"the body is no safetensors file ({error}); send one") from None
    for name, tensor in tensors:
        _check_type(name, tensor["dtype"])
    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"]) for name, tensor in tensors
    }


def _check_type(name: str, kind: str) -> None:
    if kind not in _DTYPES:
        raise UserError(f"tensor {name[:80]} is {kind[:20]}; only {', '.join(_DTYPES)} are taken")


def find(uri: str, roots: Sequence[Path | epath.Path]) -> epath.Path:
    """Returns the file or folder of a `file:` URI or absolute path, links followed, or the folder in a bucket.

    Raises `PermissionError`, and looks at nothing, unless it lies below one of `roots`; `UserError` if it is not there.
    """
    refused = PermissionError(f"weights of {uri[:80]!r}: not below a folder of sampler.weight_roots")
    buckets = [root for root in map(epath.Path, roots) if is_remote(root)]
    try:
        parts = urlsplit(uri)
        if any(parts.scheme == urlsplit(root.as_posix()).scheme for root in buckets):
            # A bucket knows no links. Its names are taken as they are: nothing in them may mean another place.
            plain = all(re.fullmatch(r"[\w=+,-][\w.=+,-]*", part) for part in uri.partition("://")[2].split("/"))
            if not plain or not any(uri.startswith(f"{root.as_posix()}/") for root in buckets):
                raise refused
            return epath.Path(uri)
        if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
            raise UserError(f"weights of {uri[:80]!r}: give an absolute path, a file: URI, or a weight root's")
        # A link may lead out of a root, so where the path really ends is compared: `realpath` opens nothing.
        real = epath.Path(os.path.realpath(unquote(parts.path) if parts.scheme else uri))
    except ValueError as error:  # a null byte, half a bracket
        raise UserError(f"weights of {uri[:80]!r}: no path ({error})") from None
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        raise refused
    if not real.exists():
        raise UserError(f"weights of {uri[:80]!r}: not there")
    return real


def read(path: Path | epath.Path, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns the parameters in a safetensors file, or in an Orbax step, converted folder or `params` folder, cast to
    `specs`. Raises `UserError` if they cannot be read or do not fit."""
    try:
        if not is_remote(epath.Path(path)) and path.is_file():  # of a bucket, Orbax's folders alone
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    _check_type(name, file.get_slice(name).get_dtype())
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        folder = path / PARAMS if (path / PARAMS).is_dir() else path
        found = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        if not isinstance(found, Mapping):
            raise UserError("no flat parameters in it")
        check_flat(specs, found)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, dict(specs))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # Orbax, tensorstore and safetensors raise nearly anything on damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: no readable safetensors file or Orbax parameters ({reason})") from None
