"""A model by the path of its folder: a Hugging Face one, a converted one, or a run of ours."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ares_jax.checkpoints.folders import read_json
from ares_jax.checkpoints.orbax_params import is_converted
from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl
from ares_jax.parallel.distributed import require_alone
from ares_jax.parallel.sharding import make_mesh
from ares_jax.params import Params
from ares_jax.run.run import Run, open_run
from data_pipeline.tokenizer import load_processors

# One prompt's image attends to itself as a whole: memory grows with the square of its patches.
_LARGEST_PROMPT = {"sampler.max_prompt_tokens": 8192, "sampler.max_prompt_patches": 32_768}


@dataclass(frozen=True)
class Opened:
    """A model that can be asked. Nothing is written to its folder."""

    run: Run
    load: Callable[[], Params]  # the weights: last, as they take longest
    name: str  # such as "runs/digits (aepo)"
    tau_high: float  # nats: the run's threshold; NaN where there is none


def open_model(path: Path, overrides: Mapping[str, Any], *, dtype: str | None = None) -> Opened:
    """Returns the model in a folder.

    Args:
      path: of a Hugging Face folder, the same converted to Orbax, or a workdir of ours (its newest stage).
      overrides: fields of the config, such as "data.max_pixels"; what they leave is the run's, or the folder's.
      dtype: arithmetic and storage; by default the run's, or what the files hold (bfloat16 on an accelerator).

    Raises:
      UserError: it is none of these, or not complete.
    """
    if not path.is_dir():
        hub = "" if path.exists() or len(path.parts) != 2 else f", or get it with `hf download {path} --local-dir <folder>`"
        raise UserError(
            f"--model_path={path}: no such folder; give a Hugging Face folder, a converted one or a run's workdir{hub}"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"--model_path={path}: no config.json in it; give a Hugging Face folder or a run's workdir")
    found = read_json(epath.Path(path / "config.json"))
    return _open_published(path, overrides, dtype) if "model_type" in found else _open_run(path, found, overrides, dtype)


def _open_run(path: Path, found: dict[str, Any], overrides: Mapping[str, Any], dtype: str | None) -> Opened:
    config = default_config()
    try:
        with config.unlocked():
            config.update(found)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: not a config of ours ({error}); copy the run's folder again") from None
    config.update_from_flattened_dict(dict(overrides))
    if dtype:
        config.model.update(dtype=dtype, param_dtype=dtype)
    run = _opened(config, path)
    stages = run.trained_stages()
    if not stages:
        raise UserError(f"--model_path={path}: no checkpoint yet; run `python -m ares_jax.cold_start` first")
    # What AEPO measured holds for the model that it trained.
    measured = read_jsonl(path / "aepo" / "metrics.jsonl") if stages[-1] == "aepo" else []
    taus = [line["tau_high"] for line in measured if line.get("tau_high") is not None]
    tau_high = taus[-1] if taus else math.nan
    return Opened(run, partial(run.params, stages[-1]), f"{path} ({stages[-1]})", tau_high)


def published_config(path: Path) -> ConfigDict:
    """Returns the config with which a Hugging Face folder, or the same converted, is asked: its own pixels, bfloat16.

    Raises as `open_model` does. Does not look for devices: a service, which takes them, may be started with it.
    """
    if not is_converted(path) and not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: neither safetensors nor a converted checkpoint in it; copy the folder whole")
    config = default_config()
    config.model.pretrained = str(path)
    config.model.dtype = config.model.param_dtype = "bfloat16"
    size = load_processors(path)[1].size
    config.data.min_pixels = size["shortest_edge"]
    config.data.max_pixels = max(size["shortest_edge"], min(size["longest_edge"], config.data.max_pixels))
    config.update_from_flattened_dict(_LARGEST_PROMPT)
    return config


def _open_published(path: Path, overrides: Mapping[str, Any], dtype: str | None) -> Opened:
    config = published_config(path)
    # An accelerator computes in bfloat16; few CPUs gain by it.
    config.model.dtype = config.model.param_dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config.update_from_flattened_dict(dict(overrides))
    run = _opened(config, path)
    return Opened(run, run.initial_params, str(path), math.nan)


def _opened(config, path: Path) -> Run:
    if config.data.min_pixels > config.data.max_pixels:
        d = config.data
        raise UserError(f"--min_pixels={d.min_pixels} is above --max_pixels={d.max_pixels}; lower one or raise the other")
    require_alone("infer")
    return open_run(config, path, mesh=make_mesh(devices=jax.devices()[:1]), read_only=True)
