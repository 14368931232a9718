"""`python -m ares_jax.convert`: checkpoints between Hugging Face and Orbax, and a run's actor as a Hugging Face folder.

    python -m ares_jax.convert --from=hf --to=orbax --source=Qwen2.5-VL-3B --target=orbax_3b [--verify]
    python -m ares_jax.convert --config=configs/digits_cpu.py --workdir=runs/digits [--stage=aepo] [--step=best]

Memory does not grow with the model: a shard at most, and a few tensors. --source and --target may be in a bucket (gs://).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from ares_jax.checkpoints.folders import (
    copy_side_files,
    is_remote,
    is_there,
    open_folder,
    read_json,
    recover,
    replacing,
    staged,
)
from ares_jax.checkpoints.huggingface import HFFolder, write_config, write_hf
from ares_jax.checkpoints.orbax_params import PARAMS, OrbaxParams, is_converted, open_converted, write_orbax
from ares_jax.checkpoints.verify import verify
from ares_jax.checkpoints.weights import Cast, ModelWeights, Weights
from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.metrics import stage
from ares_jax.parallel.sharding import make_mesh
from ares_jax.run.run import STAGES, Run, open_run

TOPICS = {
    "A folder": ("from", "to", "source", "target"),
    "Or a run": ("config", "workdir", "stage", "step"),
    "What becomes of it": ("dtype", "verify", "max_shard_size", "push_to"),
}

_FROM = flags.DEFINE_enum("from", None, ["hf", "orbax"], "what --source is; without it, the run in --workdir is exported")
_TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "what --target becomes")
_SOURCE = flags.DEFINE_string("source", None, "folder to convert")
_TARGET = flags.DEFINE_string("target", None, "folder to write; of a run, by default `export` in the workdir")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32", "keep"],
    "of the tensors written; keep: as they are stored. By default a folder's are kept, a run's are bfloat16 if that is its "
    "model.dtype: a smaller file, and what it computes with"
)  # fmt: skip
_VERIFY = flags.DEFINE_bool(
    "verify", False, "compare every tensor afterwards; a --target that is already there is only compared"
)
_STAGE = flags.DEFINE_enum("stage", None, list(STAGES), "of a run: whose weights; by default the last trained stage's")
_STEP = flags.DEFINE_string("step", "latest", "of a run: latest, best (by validation score) or a number")
_SHARD = flags.DEFINE_string(
    "max_shard_size", None, "of safetensors, such as 2GB; by default the shards the weights came in, or 5GB"
)
_PUSH = flags.DEFINE_string("push_to", None, "repository on the Hugging Face Hub, user/name: upload the result there")

_OPEN = {"hf": HFFolder, "orbax": open_converted}


def main(config: ConfigDict | None, workdir: Path | None) -> None:
    jax.config.update("jax_platforms", "cpu")  # takes no accelerator away, and waits for no other host of a TPU slice
    if _PUSH.value and _TO.value == "orbax":
        raise UserError("--push_to uploads Hugging Face folders; use --to=hf")
    if _PUSH.value and is_remote(_TARGET.value or ""):
        raise UserError(f"--push_to uploads a local folder, not --target={_TARGET.value}; name a local --target")
    if config is not None and workdir is not None:
        if _FROM.value or _TO.value or _SOURCE.value:
            raise UserError(
                "--from, --to and --source convert a folder, --config and --workdir a run: give one or the other"
            )
        target = open_folder(_TARGET.value or workdir / "export")
        _export_run(config, workdir, target)
    elif workdir is not None:
        raise UserError("--config is missing; a run is exported with both --config and --workdir")
    else:
        target = _convert_folder()
    if _PUSH.value:
        _push(target, _PUSH.value)


def _convert_folder() -> epath.Path:
    if not (_FROM.value and _TO.value and _SOURCE.value and _TARGET.value):
        raise UserError(
            "give --from, --to, --source and --target to convert a folder, or --config and --workdir to export a run"
        )
    source, target = open_folder(_SOURCE.value), open_folder(_TARGET.value)
    recover(target)
    there = is_there(target)
    if there and not _VERIFY.value:
        raise UserError(f"--target={target}: is already there; name a new folder, or --verify to compare it with the source")
    weights = _as(_DTYPE.value, _OPEN[_FROM.value](source))
    if not there:
        original = read_json(source / "config.json") if isinstance(weights, Cast) else None
        with replacing(target) as folder:
            if original:
                write_config(folder, weights, original)
            copy_side_files(source, folder)
            if _TO.value == "hf":
                write_hf(weights, folder, _SHARD.value)
            else:
                write_orbax(weights, folder)
        print(f"{source} converted to {target}")
    if _VERIFY.value:
        _report(verify(weights, _OPEN[_TO.value](target)), target, weights)
    return target


def _export_run(config: ConfigDict, workdir: Path, target: epath.Path) -> None:
    # Whatever the learner's mesh: here is one device. What the run says of itself stays as it is.
    there = (workdir / "config.json").is_file()
    run = open_run(config, workdir, mesh=make_mesh(devices=jax.local_devices()[:1]), read_only=there)
    stages = [_STAGE.value] if _STAGE.value else run.trained_stages()
    if not stages:
        raise UserError(f"{workdir}: no checkpoint to convert; run `python -m ares_jax.cold_start` first")
    weights, name = _stage_weights(run, stages[-1], _STEP.value)
    half = config.model.dtype if config.model.dtype == "bfloat16" else None
    weights = _as(_DTYPE.value or half, weights)
    with stage(workdir, "export"), replacing(target) as folder:
        with staged(folder) as local:
            run.tokenizer.save_pretrained(local)
            run.encoder.image_processor.save_pretrained(local)
        pretrained = epath.Path(config.model.pretrained) if config.model.pretrained else None
        write_config(folder, weights, read_json(pretrained / "config.json") if pretrained else None)
        write_hf(weights, folder, _SHARD.value)
        for others in filter(None, (pretrained, target if folder != target and target.exists() else None)):
            copy_side_files(others, folder)
    print(f"{name} exported to {target}")
    if _VERIFY.value:
        _report(verify(weights, HFFolder(target)), target, weights)


def _stage_weights(run: Run, name: str, which: str) -> tuple[Weights, str]:
    """Returns the actor's weights of a stage and what to call them."""
    checkpoints = run.checkpoints(name)
    steps = checkpoints.steps()
    if not steps:
        return _base_weights(run, name), name
    choices = {"latest": steps[-1], "best": checkpoints.best(), **{str(step): step for step in steps}}
    if (step := choices.get(which)) is None:
        there = ", ".join(map(str, steps))
        raise UserError(f"--step={which}: no such step in {checkpoints.folder}; give latest, best or one of {there}")
    folder = epath.Path(checkpoints.folder) / str(step) / PARAMS
    return OrbaxParams(folder, run.model.config, lora=run.model.lora), f"{name} step {step}"


def _base_weights(run: Run, name: str) -> Weights:
    """Returns the weights before any training, in the run's type. Of another stage there are none, which `load` says."""
    m = run.config.model
    if name != "base" or not m.pretrained or run.config.cold_start.warmup_steps:
        return ModelWeights(run.load(name))
    return _as(m.param_dtype, (open_converted if is_converted(m.pretrained) else HFFolder)(m.pretrained))


def _as(dtype: str | None, weights: Weights) -> Weights:
    """Returns the weights in a type (None or "keep": their own)."""
    return weights if dtype in (None, "keep") else Cast(weights, np.dtype(jnp.dtype(dtype)))


def _push(folder: epath.Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        url = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="ares-jax export")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--push_to={repository}: {reason}; the folder {folder} is complete, log in with `hf auth login`"
        ) from None
    print(f"uploaded to {url}")


def _report(count: int, target: epath.Path, weights: Weights) -> None:
    rounded = f" in {weights.dtype}" if isinstance(weights, Cast) else ""
    print(f"verified: {count} tensors of {target} are the source's{rounded}, bit for bit")


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main, config_optional=True, processes="first")
