"""Hugging Face folders of Qwen2.5-VL: `config.json` and safetensors, both ways, bit for bit.

safetensors only: no pickle is ever opened. Tensors are read one by one and written shard by shard.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ares_jax.checkpoints.folders import INDEX, copy_side_files, open_folder, read_json, replacing, staged
from ares_jax.checkpoints.names import EMBEDDING, HEAD
from ares_jax.checkpoints.tensor_file import TensorFile
from ares_jax.checkpoints.weights import WORKERS, Entry, ModelWeights, Weights
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.distributed import put
from ares_jax.parallel.sharding import param_shardings
from ares_jax.params import to_flat, with_params

SHARD_BYTES = 5_000_000_000  # the Hub's own default


def load_hf(path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: jnp.dtype | None = None) -> Qwen25VL:
    """Returns the model of a Hugging Face folder.

    Args:
      path: folder with `config.json` and `*.safetensors`; both key layouts (before and since transformers 4.52) load.
      mesh: shards the parameters over it; None keeps them on the default device.
      dtype: storage and arithmetic of the parameters; None keeps the files' storage and computes in float32.

    Raises:
      UserError: a file is missing or truncated, or a tensor is missing, unknown or of the wrong shape; it is named.
    """
    weights = HFFolder(path)
    storage = np.dtype(dtype or next(iter(weights.entries.values())).dtype)
    template = abstract_model(weights.config, dtype=dtype or jnp.float32, param_dtype=storage)
    shardings = param_shardings(template, mesh) if mesh is not None else {}
    sources = {(slot.ours, slot.layer): name for name, slot in weights.slots.items()}
    flat = {}
    for ours, shape in to_flat(template).items():
        value = np.empty(shape.shape, storage)
        for layer in range(shape.shape[0]) if (ours, 0) in sources else [None]:
            name = sources[ours, layer]
            value[... if layer is None else layer] = weights.slots[name].to_ours(weights.read(name))
        flat[ours] = put(value, shardings.get(ours))
    return with_params(template, flat)


def read_config(folder: str | Path) -> Qwen25VLConfig:
    """Returns the shape of the model in a Hugging Face folder."""
    return Qwen25VLConfig.from_hf(read_json(open_folder(folder) / "config.json"))


def save_hf(model: Qwen25VL, path: str | Path) -> None:
    """Writes `config.json` and safetensors that `transformers` loads. Whole or not at all: an existing folder is kept
    until the new one is complete, and its other files (tokenizer, preprocessor) stay."""
    folder = open_folder(path)
    with replacing(folder) as temporary:
        weights = ModelWeights(model)
        write_hf(weights, temporary)
        write_config(temporary, weights)
        if folder != temporary and folder.exists():
            copy_side_files(folder, temporary)


class HFFolder(Weights):
    """The tensors of a Hugging Face folder. Nothing is mapped into memory: a tensor is there while its reader holds it."""

    def __init__(self, path: str | Path):
        folder = open_folder(path)
        config = read_config(folder)
        files, index = _files(folder)
        self._open: dict[str, TensorFile] = {}
        entries: dict[str, Entry] = {}
        for file in files:
            opened = self._open[file.name] = TensorFile(file)
            for name, part in opened.parts.items():
                if name in entries:
                    raise UserError(f"{folder}: tensor {name} is in {entries[name].file} and {file.name}; remove one")
                entries[name] = Entry(part.shape, part.dtype, file.name)
        for name in index.get("weight_map", {}):
            if name not in entries:
                raise UserError(f"{folder}: tensor {name} is missing, though the index lists it; copy the folder again")
        super().__init__(str(folder), config, entries, index.get("metadata", {}) if index else None)
        if config.tie_word_embeddings and HEAD in self.by_new_name:
            self._check_tied(self.by_new_name[HEAD], self.by_new_name[EMBEDDING])

    def read(self, name: str) -> np.ndarray:
        try:
            return self._open[self._file(name)].read(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.where}: tensor {name} cannot be read ({error}); copy the file again") from None

    def _check_tied(self, head: str, embedding: str) -> None:
        a, b = (self._open[self._file(name)] for name in (head, embedding))
        rows = self.entries[head].shape[0]
        for row in range(0, rows, 4096):
            end = min(row + 4096, rows)
            left, right = a.rows(head, row, end), b.rows(embedding, row, end)
            if left.dtype != right.dtype or left.tobytes() != right.tobytes():
                raise UserError(
                    f"{self.where}: {head} differs from {embedding}, yet config.json ties them; "
                    "set tie_word_embeddings to false there, or remove the tensor"
                )

    def _file(self, name: str) -> str:
        file = self.entries[name].file
        assert file is not None
        return file


def write_hf(weights: Weights, folder: epath.Path, max_shard_size: int | str | None = None) -> None:
    """Writes safetensors and their index into `folder`, one shard in memory at a time.

    Shards are those the weights came in; where they came in none, or `max_shard_size` (such as "5GB") is given, new ones.
    """
    for file, names in _shards(weights.entries, max_shard_size).items():
        with ThreadPoolExecutor(WORKERS) as pool:
            tensors = dict(zip(names, pool.map(weights.read, names), strict=True))
        try:
            with staged(folder) as local:
                save_file(tensors, local / file, {"format": "pt"})
                del tensors  # before the next shard is read
        except SafetensorError as error:  # a full disk, most likely
            raise OSError(str(error)) from error
    metadata = weights.index_metadata if max_shard_size is None else None
    files = _shards(weights.entries, max_shard_size)
    if metadata is not None or len(files) > 1:
        total = {"total_size": sum(entry.nbytes for entry in weights.entries.values())}
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": total if metadata is None else metadata, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(folder: epath.Path, weights: Weights, original: dict[str, Any] | None = None) -> None:
    """Writes `config.json`: the `original` one if given, with the type in which the weights are now stored."""
    dtype = str(next(iter(weights.entries.values())).dtype)
    config = original or weights.config.to_hf()
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 and 5
    nested = {
        name: {**part, inner: dtype} for name, part in config.items() if isinstance(part, dict)
        for inner in ("dtype", "torch_dtype") if inner in part
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **nested, key: dtype}, indent=2) + "\n")


def _files(folder: epath.Path) -> tuple[list[epath.Path], dict[str, Any]]:
    """Returns the files that make up the checkpoint, and the index if it has one, as `transformers` chooses them."""
    found = {file.name: file for file in sorted(folder.iterdir())}
    if "model.safetensors" in found:
        return [found["model.safetensors"]], {}
    files = {name: file for name, file in found.items() if file.suffix == ".safetensors"}
    if INDEX in found:
        index = read_json(found[INDEX])
        listed = list(dict.fromkeys(index.get("weight_map", {}).values()))
        if lost := [name for name in listed if name not in files]:
            raise UserError(f"{folder}: shard {lost[0]} is listed in the index but not there; download it again")
        return [files[name] for name in listed], index
    if not files:
        pickles = [name for suffix in (".bin", ".pt", ".pth") for name in found if name.endswith(suffix)]
        pickle = f", only {pickles[0]}, a pickle, which is never opened" if pickles else ""
        raise UserError(f"{folder}: no .safetensors file{pickle}; save the checkpoint with safe_serialization=True")
    return list(files.values()), {}


def _shards(entries: Mapping[str, Entry], max_shard_size: int | str | None) -> dict[str, list[str]]:
    if max_shard_size is None and all(entry.file for entry in entries.values()):
        shards: dict[str, list[str]] = {}
        for name, entry in entries.items():
            assert entry.file is not None
            if Path(entry.file).name != entry.file:
                raise UserError(f"tensor {name}: shard {entry.file!r} is no file name; correct huggingface.json")
            shards.setdefault(entry.file, []).append(name)
        return shards
    try:
        split = split_state_dict_into_shards_factory(
            dict(entries),
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size or SHARD_BYTES,
        )
    except ValueError:
        raise UserError(f"--max_shard_size={max_shard_size}: not a size; write it like 5GB or 500MB") from None
    return split.filename_to_tensors
