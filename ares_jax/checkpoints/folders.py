"""Folders that are whole or not there, here or in a bucket, and the files that go with weights: config, tokenizer, ..."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from ares_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DESCRIPTION = "huggingface.json"  # in a converted Orbax folder: the Hugging Face tensors that it holds
PARTIAL = ".ares_partial"  # in a folder of a bucket while it is being written
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".pkl")


def open_folder(name: str | Path) -> epath.Path:
    """Returns a folder of this machine or of a bucket: `gs://`, and what else etils knows.

    Raises:
      UserError: no file system is known or installed for it, or the bucket cannot be reached.
    """
    if not is_remote(name):
        return epath.Path(name)
    try:
        folder = epath.Path(str(name))
        folder.exists()  # the first question loads the file system, and logs in
        return folder
    except KeyError:
        raise UserError(f"{name}: no file system is known for it; name a local folder, or gs://bucket/folder") from None
    except ImportError as error:
        raise UserError(f"{name}: {error}: `pip install gcsfs` for gs:// (the extra .[gcs])") from None
    except Exception as error:  # each file system's own: no login, no such bucket, no network
        raise UserError(f"{name}: cannot be reached ({reason(error)}); log in, and check the bucket's name") from error


@contextmanager
def replacing(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields an empty folder that takes the place of `folder` at the end; on an error nothing of it remains.

    A bucket knows no renaming: there the folder itself is yielded, which must be empty or left over, and holds the file
    `PARTIAL` until it is complete.
    """
    if is_remote(folder):
        with _filling(folder), _one_line(folder):
            yield folder
        return
    folder = folder.absolute()
    temporary, old = _beside(folder)
    try:
        with _one_line(folder):
            recover(folder)
            for leftover in (temporary, old):
                if leftover.exists():
                    leftover.rmtree()
            temporary.mkdir(parents=True)
            yield temporary
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            if old.exists():
                old.rmtree()
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if temporary.exists():
            temporary.rmtree()
        raise


def recover(folder: epath.Path) -> None:
    """Ends what a run began that was killed between the two renames of `replacing`: its new folder was complete."""
    if is_remote(folder):
        return
    temporary, old = _beside(folder.absolute())
    if old.exists() and temporary.exists() and not folder.exists():
        temporary.rename(folder)


def is_there(folder: epath.Path) -> bool:
    """Returns whether something complete, or not ours, is in a folder."""
    return folder.exists() and any(folder.iterdir()) and not (folder / PARTIAL).exists()


@contextmanager
def staged(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields a local folder; the files written there are in `folder` afterwards."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ares_") as name:
        yield epath.Path(name)
        for file in epath.Path(name).iterdir():
            file.copy(folder / file.name)


def _beside(folder: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Returns where the new folder is written, and where the old one waits until the new one has its name."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


@contextmanager
def _filling(folder: epath.Path) -> Iterator[None]:
    if len(folder.parts) < 4:  # "/", "gs", the bucket's name: to clean up would be to empty it
        raise UserError(f"{folder}: is a whole bucket; name a folder in it")
    if is_there(folder):
        raise UserError(f"{folder}: is already there, and a bucket knows no renaming; name a new folder, or remove that one")
    if folder.exists():
        folder.rmtree()
    try:
        (folder / PARTIAL).write_text("not complete: `python -m ares_jax.convert` is writing here, or was ended\n")
        yield
        (folder / PARTIAL).unlink()
    except BaseException:
        folder.rmtree(missing_ok=True)
        raise


@contextmanager
def _one_line(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder}: cannot be written ({why}); free space, or name another") from error


def copy_side_files(source: epath.Path, target: epath.Path) -> None:
    """Copies every file of `source` that holds no weights and is not hidden, unless `target` has one of that name."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        hidden = file.name.startswith(".") or file.name in (INDEX, DESCRIPTION)
        if not hidden and file.suffix not in _WEIGHTS and not file.is_dir() and not (target / file.name).exists():
            file.copy(target / file.name)


def absolute(path: epath.Path) -> epath.Path:
    """Returns a path as Orbax wants it. (etils would put the working directory before gs://.)"""
    return path if is_remote(path) else path.absolute()


def is_remote(path: str | Path | epath.Path) -> bool:
    return "://" in str(path)


def read_json(file: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `UserError` if it is not there, or no JSON."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the folder of a Qwen2.5-VL checkpoint") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the file again") from None


def reason(error: Exception) -> str:
    """Returns what an error of a library says, in one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
