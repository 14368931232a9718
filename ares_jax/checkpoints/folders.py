"""Folders that are whole or not there, and the files that go with weights: config, tokenizer, processors, template."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from ares_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DESCRIPTION = "huggingface.json"  # in a converted Orbax folder: the Hugging Face tensors that it holds
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".pkl")


@contextmanager
def replacing(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields an empty folder that takes the place of `folder` at the end; on an error nothing of it remains.

    A bucket knows no renaming: there the folder itself is yielded, and readers go by its last file.
    """
    if is_remote(folder):
        yield folder
        return
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        for leftover in (temporary, old):  # of a killed run
            if leftover.exists():
                leftover.rmtree()
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        if old.exists():
            old.rmtree()
    except BaseException as error:
        if temporary.exists():
            temporary.rmtree()
        if isinstance(error, OSError):
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); free space, or name another"
            ) from error
        raise


def copy_side_files(source: epath.Path, target: epath.Path) -> None:
    """Copies every file of `source` that holds no weights, unless `target` has one of that name."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        hidden = file.name.startswith(".") or file.name in (INDEX, DESCRIPTION)
        if not hidden and file.suffix not in _WEIGHTS and not file.is_dir() and not (target / file.name).exists():
            file.copy(target / file.name)


def is_remote(path: epath.Path) -> bool:
    return "://" in path.as_posix()


def read_json(file: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `UserError` if it is not there, or no JSON."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the folder of a Qwen2.5-VL checkpoint") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the file again") from None
