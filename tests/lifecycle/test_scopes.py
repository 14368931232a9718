"""A trace names what it shows: the scopes that docs/pods.md lists stand in the programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import flagsaver

from ares_jax.commands import serve
from ares_jax.lifecycle.startup import Startup
from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.params import to_flat
from ares_jax.planning import aot
from ares_jax.sampling.programs import Programs, Prompts
from ares_jax.sampling.rows import to_rows
from configs.digits_cpu import get_config
from tests import digits


def scopes(*lowered):
    """Returns the names in the programs' locations, but those of jitted functions."""
    text = re.sub(r"jit\(\w+\)", "", "".join(program.as_text(debug_info=True) for program in lowered))
    return {name for place in re.findall(r'loc\("([^"]*)"', text) for name in re.findall(r"[a-z_]+", place)}


def test_the_samplers_programs_name_their_scopes():
    none = jnp.zeros(digits.VOCABULARY, bool)
    programs = Programs(
        digits.model(), eos_token_ids=(0,), banned=none, trigger=none, steps=2, kernel="xla", prefill_layers=16
    )

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    params, pages = to_flat(digits.model()), array(2, 20, 8, 4, 16, dtype=jnp.float32)
    vision = VisionInputs(array(1, 48, 1176, dtype=jnp.float32), array(1, 48, 2), array(1, 48), array(1, 48))
    prompts = Prompts(array(1, 64), array(1, 3, 64), array(1, 64), array(1, 8), vision)
    prefill = scopes(jax.jit(programs.prefill).lower(params, pages, prompts))
    assert {"prefill", "vision", "text", "attention", "project", "mlp"} <= prefill and "decode" not in prefill
    decode = scopes(programs.decode.lower(params, pages, np.zeros((4, 8), np.int32), to_rows([], 4, 3)))
    assert {"decode", "text", "paged_attention", "project", "mlp"} <= decode and "prefill" not in decode


def test_a_training_steps_programs_name_their_scopes():
    programs = aot._fine_tuning(get_config(), digits.model().config, jax.devices()[:1])[1]
    gradients = scopes(programs["more"]())
    assert {"text", "vision", "project", "attention", "mlp", "log_probs"} <= gradients and "optimizer" not in gradients
    assert "optimizer" in scopes(programs["apply"]())


def test_a_service_lets_a_trace_be_fetched_and_tells_its_start(monkeypatch, tmp_path, capsys):
    ports: list[int] = []
    monkeypatch.setattr(jax.profiler, "start_server", ports.append)
    monkeypatch.setattr(serve, "STARTUP", Startup())
    monkeypatch.setattr(serve, "run_server", lambda make_engine, **options: options["on_ready"]())
    flags.FLAGS.mark_as_parsed()
    serve.main(get_config(), tmp_path)
    with flagsaver.flagsaver(profile_port=9012):
        serve.main(get_config(), tmp_path)
    assert ports == [9012]
    assert capsys.readouterr().out.count("start-up: engine and server ") == 1
