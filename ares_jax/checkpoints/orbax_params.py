"""Parameters in Orbax, written and read one tensor at a time: neither the model nor a stack of layers is ever in memory.

A converted folder holds `params` (an Orbax checkpoint of the flat parameters, one chunk or more a layer), the side files of
the Hugging Face folder it came from, and `huggingface.json`: every tensor's name, type and shard, to go back by.
"""

import asyncio
import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ares_jax.checkpoints.folders import DESCRIPTION, absolute, open_folder, read_json, reason
from ares_jax.checkpoints.huggingface import read_config
from ares_jax.checkpoints.names import Slot, slots
from ares_jax.checkpoints.weights import WORKERS, Budget, Entry, Weights
from ares_jax.errors import UserError
from ares_jax.models.lora import Lora, factors, merge_kernel
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.sharding import param_shardings
from ares_jax.params import check_flat, to_flat, with_params

PARAMS = "params"
CHUNK_BYTES = 16 * 2**20  # at most: a chunk is read, and decompressed, whole


class OrbaxParams(Weights):
    """The `params` part of one of our checkpoints, as Hugging Face's tensors.

    `described`: their names, types and shards. `lora`: the parameters have its factors; they are merged as they are read.
    """

    def __init__(
        self,
        folder: epath.Path,
        config: Qwen25VLConfig,
        described: dict[str, Any] | None = None,
        lora: Lora | None = None,
    ):
        self._lora = lora
        try:
            found = ocp.PyTreeCheckpointHandler().metadata(folder).tree
            check_flat(to_flat(abstract_model(config, lora=lora)), found)
            context = ocp.type_handlers.get_ts_context()
            self._stores = {name: _open(folder, name, context) for name in found}
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except Exception as error:
            raise UserError(f"{folder}: no readable Orbax parameters ({reason(error)}); convert or train again") from error
        table = slots(config)
        if described is None:
            entries = {name: Entry(slot.shape, found[slot.ours].dtype) for name, slot in table.items()}
        else:
            entries = {
                name: Entry(tuple(tensor["shape"]), jnp.dtype(tensor["dtype"]), tensor["file"])
                for name, tensor in described["tensors"].items()
            }
        super().__init__(str(folder), config, entries, (described or {}).get("index_metadata"))

    def read(self, name: str) -> np.ndarray:
        return self.read_as(name, self.entries[name].dtype)

    def read_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        slot = self.slots[name]
        store = self._stores[slot.ours]
        value = np.empty(slot.shape, dtype)
        ours = slot.to_ours(value)  # a view: filled and rounded chunk by chunk, it needs no second copy
        try:
            for block, part in _parts(store if slot.layer is None else store[slot.layer]):
                ours[block] = self._merged(slot, block, part.read().result())
        except Exception as error:
            raise UserError(f"{self.where}: tensor {name} cannot be read ({reason(error)}); copy it again") from error
        return value

    def _merged(self, slot: Slot, block: tuple[slice, ...], chunk: np.ndarray) -> np.ndarray:
        name_a, name_b = factors(slot.ours)
        if self._lora is None or name_a not in self._stores:
            return chunk
        rows, columns = block
        a = self._stores[name_a][slot.layer, rows].read().result()
        b = self._stores[name_b][slot.layer, :, columns].read().result()
        return merge_kernel(chunk, a, b, self._lora.scale)


def open_converted(path: str | Path) -> OrbaxParams:
    """Returns the weights of a folder that `write_orbax` made. Raises `UserError` if it is none, or not complete."""
    folder = open_folder(path)
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{path}: no {DESCRIPTION} in it; give a folder made by --to=orbax (and copied whole)")
    return OrbaxParams(folder / PARAMS, read_config(path), read_json(folder / DESCRIPTION))


def is_converted(path: str | Path) -> bool:
    return (open_folder(path) / DESCRIPTION).exists()


def load_orbax(path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: jnp.dtype | None = None) -> Qwen25VL:
    """Returns the model of a converted folder; the arguments are those of `load_hf`. Each device reads its own part.

    Raises `UserError` if it is none, or a tensor is damaged; it is named.
    """
    weights = open_converted(path)
    storage = np.dtype(dtype or next(iter(weights.entries.values())).dtype)
    template = abstract_model(weights.config, dtype=dtype or jnp.float32, param_dtype=storage)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = param_shardings(template, mesh) if mesh is not None else {}
    target = {
        name: jax.ShapeDtypeStruct(value.shape, storage, sharding=shardings.get(name, here))
        for name, value in to_flat(template).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            flat = checkpointer.restore(absolute(open_folder(path) / PARAMS), target)
        except jax.errors.JaxRuntimeError:  # no memory
            raise
        except Exception as error:
            for name in weights.entries:  # Orbax does not say which: whoever reads it does
                weights.read(name)
            raise UserError(f"{path}: cannot be read ({reason(error)}); copy it again") from error
    return with_params(template, flat)


def write_orbax(weights: Weights, folder: epath.Path) -> None:
    """Writes `params` and then `huggingface.json` into `folder`. In memory: a few tensors."""
    errors: list[BaseException] = []
    leaves = _leaves(weights, errors)
    save_args = {name: save_arguments(name, len(leaf.shape)) for name, leaf in leaves.items()}
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as saver:
        arrays = (jax.Array, ocp.type_handlers.ArrayHandler())  # unused, but Orbax warns without it
        registry = ocp.type_handlers.create_type_handler_registry((_Streamed, _StreamHandler(pool)), arrays)
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
        arguments = ocp.args.PyTreeSave(leaves, save_args)
        saving = saver.submit(checkpointer.save, absolute(folder / PARAMS), args=arguments)
        try:
            saving.result()
        except BaseException as error:  # an interrupt, too: then the leaves stop, and nobody writes after this block
            errors.append(error)
    checkpointer.close()
    if errors:
        raise errors[0]
    tensors = {
        name: {"shape": entry.shape, "dtype": str(entry.dtype), "file": entry.file}
        for name, entry in weights.entries.items()
    }
    description = {"tensors": tensors, "index_metadata": weights.index_metadata}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def save_arguments(name: str, rank: int) -> ocp.SaveArgs:
    """Returns how a parameter is stored: in small chunks, none of two layers, so that one can be read without the others."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if ".layers." in name and rank > 2 else ())


@dataclass(frozen=True)
class _Streamed:
    """An array that is not in memory: what Orbax asks of a leaf, and how to fill it once it is open."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[str, ...]
    weights: Weights
    budget: Budget
    errors: list[BaseException]  # of all leaves; Orbax itself would log a traceback and let the others go on writing

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def fill(self, store: ts.TensorStore) -> None:
        for name in self.sources:
            slot = self.weights.slots[name]
            with self.budget.take(self.weights.entries[name].nbytes):
                if self.errors:
                    return
                try:
                    value = slot.to_ours(self.weights.read(name))
                    for block, part in _parts(store if slot.layer is None else store[slot.layer]):
                        part.write(value[block].astype(self.dtype)).result()
                except Exception as error:  # tensorstore calls a full disk a ValueError
                    self.errors.append(OSError(reason(error)) if isinstance(error, ValueError) else error)


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's own handler of arrays, but for where the values come from. Threads of `pool` fill them."""

    def __init__(self, pool: ThreadPoolExecutor):
        super().__init__(deepcopy_host_arrays=False)
        self._pool = pool

    async def _open_and_write(self, value: _Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        await asyncio.get_running_loop().run_in_executor(self._pool, value.fill, store)


def _leaves(weights: Weights, errors: list[BaseException]) -> dict[str, _Streamed]:
    budget = weights.budget()
    leaves = {}
    for ours, shape in to_flat(abstract_model(weights.config)).items():
        sources = {slot.layer: name for name, slot in reversed(weights.slots.items()) if slot.ours == ours}
        names = tuple(sources[layer] for layer in sorted(sources, key=lambda layer: layer or 0))
        # Layers may be stored in different types; each widens without loss, and `huggingface.json` knows the way back.
        dtype = functools.reduce(jnp.promote_types, (weights.entries[name].dtype for name in names))
        leaves[ours] = _Streamed(shape.shape, np.dtype(dtype), names, weights, budget, errors)
    return leaves


def _parts(store: ts.TensorStore) -> Iterator[tuple[tuple[slice, ...], ts.TensorStore]]:
    """Yields every chunk, and where it lies."""
    chunk = store.spec().chunk_layout.write_chunk.shape or store.shape
    grid = [range(0, size, step or size) for size, step in zip(store.shape, chunk, strict=True)]
    for start in product(*grid):
        index = tuple(slice(i, min(i + axis.step, axis.stop)) for i, axis in zip(start, grid, strict=True))
        yield index, store[index]


def _open(folder: epath.Path, name: str, context: ts.Context) -> ts.TensorStore:
    info = ocp.type_handlers.ParamInfo(name=name, parent_dir=absolute(folder), ts_context=context)
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
    return ts.open(ts.Spec(spec), open=True, read=True, context=context).result()
