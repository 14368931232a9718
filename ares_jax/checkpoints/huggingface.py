"""Hugging Face folders of Qwen2.5-VL: `config.json` and safetensors, both ways, bit for bit.

safetensors only: no pickle is ever opened.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ares_jax.checkpoints.params import to_flat, with_params
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.sharding import param_shardings

SHARD_BYTES = 4 * 2**30

# Ours -> theirs, per layer. A kernel is stored transposed there ([out, in]); "patch" is a 3-D convolution there.
_TEXT_LAYER = {
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "q_kernel": "self_attn.q_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k_kernel": "self_attn.k_proj.weight", "k_bias": "self_attn.k_proj.bias",
    "v_kernel": "self_attn.v_proj.weight", "v_bias": "self_attn.v_proj.bias",
    "out_kernel": "self_attn.o_proj.weight", "gate_kernel": "mlp.gate_proj.weight",
    "up_kernel": "mlp.up_proj.weight", "down_kernel": "mlp.down_proj.weight",
}  # fmt: skip
_VISION_LAYER = {
    "norm1": "norm1.weight", "norm2": "norm2.weight", "qkv_kernel": "attn.qkv.weight", "qkv_bias": "attn.qkv.bias",
    "out_kernel": "attn.proj.weight", "out_bias": "attn.proj.bias", "gate_kernel": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias", "up_kernel": "mlp.up_proj.weight", "up_bias": "mlp.up_proj.bias",
    "down_kernel": "mlp.down_proj.weight", "down_bias": "mlp.down_proj.bias",
}  # fmt: skip
_SINGLE = {
    "text.embedding": "model.language_model.embed_tokens.weight", "text.norm": "model.language_model.norm.weight",
    "lm_head": "lm_head.weight", "visual.patch_embed": "model.visual.patch_embed.proj.weight",
    "visual.merger_norm": "model.visual.merger.ln_q.weight",
    "visual.merger_in_kernel": "model.visual.merger.mlp.0.weight",
    "visual.merger_in_bias": "model.visual.merger.mlp.0.bias",
    "visual.merger_out_kernel": "model.visual.merger.mlp.2.weight",
    "visual.merger_out_bias": "model.visual.merger.mlp.2.bias",
}  # fmt: skip


def load_hf(path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: jnp.dtype | None = None) -> Qwen25VL:
    """Returns the model of a Hugging Face folder.

    Args:
      path: folder with `config.json` and `*.safetensors`; both key layouts (before and since transformers 4.52) load.
      mesh: shards the parameters over it; None keeps them on the default device.
      dtype: storage and arithmetic of the parameters; None keeps the files' storage and computes in float32.

    Raises:
      UserError: a file is missing or truncated, or a tensor is missing, unknown or of the wrong shape; it is named.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = _Tensors(folder)
    storage = dtype or tensors.dtype()
    template = abstract_model(config, dtype=dtype or jnp.float32, param_dtype=storage)
    shardings = param_shardings(template, mesh) if mesh is not None else {}
    used: set[str] = set()
    flat = {}
    for name, shape in to_flat(template).items():
        value = _gather(name, shape, tensors, used, storage)
        flat[name] = jax.device_put(value, shardings.get(name))
    unknown = sorted(tensors.names() - used - ({"lm_head.weight"} if config.tie_word_embeddings else set()))
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} tensors do not belong to Qwen2.5-VL, the first is {unknown[0]}")
    return with_params(template, flat)


def read_config(folder: Path) -> Qwen25VLConfig:
    """Returns the shape of the model in a Hugging Face folder."""
    return Qwen25VLConfig.from_hf(_read_json(folder / "config.json"))


def save_hf(model: Qwen25VL, path: str | Path) -> None:
    """Writes `config.json` and safetensors that `transformers` loads. Whole or not at all: an existing folder is kept
    until the new one is complete, and its other files (tokenizer, preprocessor) stay."""
    folder = Path(path)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists():
        keep = shutil.ignore_patterns("*.safetensors", "model.safetensors.index.json")
        shutil.copytree(folder, temporary, ignore=keep)
    else:
        temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, _exported(to_flat(model), model.config))
        config = {**model.config.to_hf(), "dtype": str(jnp.dtype(jax.tree.leaves(nnx.state(model))[0].dtype))}
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Tensors:
    """The tensors of a folder by their name in the newer layout; read lazily."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no .safetensors file; only safetensors checkpoints are read")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed = set(_read_json(index)["weight_map"].values())
            lost = sorted(listed - {file.name for file in files})
            if lost:
                raise UserError(f"{folder}: shard {lost[0]} is listed in the index but not there; download it again")
            files = [file for file in files if file.name in listed]
        self._folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, safe_open] = {}
        for file in files:
            try:
                self._open[file] = safe_open(file, framework="flax")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({error}); the file is truncated, copy it again") from None
            for name in self._open[file].keys():
                self._where[_new_layout(name)] = (file, name)

    def names(self) -> set[str]:
        return set(self._where)

    def dtype(self) -> jnp.dtype:
        return self.get(next(iter(self._where))).dtype

    def get(self, name: str) -> jax.Array:
        if name not in self._where:
            raise UserError(f"{self._folder}: tensor {name} is missing; the checkpoint is incomplete")
        file, stored = self._where[name]
        return self._open[file].get_tensor(stored)


def _gather(name: str, shape: jax.ShapeDtypeStruct, tensors: _Tensors, used: set[str], dtype) -> jax.Array:
    theirs = list(_theirs(name, shape.shape[0]))
    parts = []
    for source in theirs:
        used.add(source)
        part = _from_theirs(name, tensors.get(source))
        expected = shape.shape[1:] if len(theirs) > 1 or ".layers." in name else shape.shape
        if part.shape != expected:
            raise UserError(f"tensor {source} has shape {part.shape} here, config.json says {expected}")
        parts.append(part.astype(dtype))
    return jnp.stack(parts) if ".layers." in name else parts[0]


def _theirs(name: str, layers: int) -> Iterator[str]:
    """Yields the tensors that make up one of ours, in order of layers."""
    tower, _, leaf = name.partition(".layers.")
    if not leaf:
        yield _SINGLE[name]
        return
    for layer in range(layers):
        if tower == "text":
            yield f"model.language_model.layers.{layer}.{_TEXT_LAYER[leaf]}"
        else:
            yield f"model.visual.blocks.{layer}.{_VISION_LAYER[leaf]}"


def _exported(flat: dict[str, jax.Array], config: Qwen25VLConfig) -> Iterator[tuple[str, np.ndarray]]:
    v = config.vision
    for name, value in flat.items():
        pieces = value if ".layers." in name else [value]
        for source, piece in zip(_theirs(name, len(pieces)), pieces, strict=True):
            if name == "visual.patch_embed":
                shape = (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
                yield source, np.ascontiguousarray(np.asarray(piece).T).reshape(shape)
            elif name.endswith("_kernel"):
                yield source, np.ascontiguousarray(np.asarray(piece).T)
            else:
                yield source, np.asarray(piece)


def _from_theirs(name: str, value: jax.Array) -> jax.Array:
    if name == "visual.patch_embed":
        return value.reshape(value.shape[0], -1).T
    return value.T if name.endswith("_kernel") else value


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    shards: list[dict[str, str]] = []  # names only: a shard's tensors are dropped once written
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush():
        file = f"model-{len(shards) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        shards.append({name: file for name in shard})

    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {name: file for names in shards for name, file in names.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _new_layout(name: str) -> str:
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model.", name)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the folder of a Hugging Face checkpoint") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the file again") from None
