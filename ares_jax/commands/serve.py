"""`python -m ares_jax.serve`: the sampler service of a run, for learners and OpenAI clients. One process a host."""

import functools
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.parallel.distributed import require_alone
from ares_jax.run.run import Run, open_run
from ares_jax.run.samplers import sampler_mesh
from ares_jax.sampling import Engine
from ares_jax.service.chat import ChatFormat
from ares_jax.service.process import die_with
from ares_jax.service.server import run_server

TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "A trace of it": ("profile_port",),
    "Where others start it": ("ready_file", "parent"),
}

_READY_FILE = flags.DEFINE_string("ready_file", None, "written with the address once the service answers")
_PROFILE_PORT = flags.DEFINE_integer(
    "profile_port", 0, "where TensorBoard's profile plugin and xprof fetch a trace from, without a token; 0: nowhere"
)
_PARENT = flags.DEFINE_integer("parent", 0, "process that started this one; the service ends with it")


def make_engine(config: ConfigDict, folder: Path) -> Engine:
    """Returns an engine with the weights of the run's newest stage, or the initial ones."""
    return _engine(_open(config, folder))


def _open(config: ConfigDict, folder: Path) -> Run:
    require_alone("serve")
    return open_run(config, folder, mesh=sampler_mesh(config))


def _engine(run: Run) -> Engine:
    stages = run.trained_stages()
    params = run.params(stages[-1]) if stages else run.initial_params()
    STARTUP.mark("weights")
    return run.engine(params)


def _tell_start() -> None:
    if line := STARTUP.told("engine and server"):
        print(line, flush=True)


def main(config: ConfigDict, workdir: Path) -> None:
    if _PARENT.value:
        die_with(_PARENT.value)
    if _PROFILE_PORT.value:
        jax.profiler.start_server(_PROFILE_PORT.value)
    run = functools.cache(lambda: _open(config, workdir))  # once the address is known to be free
    run_server(
        lambda: _engine(run()), host=config.sampler.host, port=config.sampler.port,
        model_name=workdir.absolute().name, ready_file=Path(_READY_FILE.value) if _READY_FILE.value else None,
        make_chat_format=lambda: ChatFormat(run().encoder, max_prompt_tokens=config.sampler.max_prompt_tokens),
        image_hosts=tuple(config.sampler.image_hosts),
        weight_roots=[workdir / "checkpoints", *map(epath.Path, config.sampler.weight_roots)],
        transfers=config.sampler.transfers, drain_seconds=config.sampler.drain_seconds, on_ready=_tell_start,
        folder=workdir,
    )  # fmt: skip


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main, processes="each")
