"""All commands in order on a few problems: a killed run resumes, and the export is the model."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.metrics import read_jsonl
from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.run.run import open_run
from configs.resolved import get_config
from data_pipeline.tokenizer import load_processors
from data_pipeline.vision_layout import vision_layout
from tests.digits import TINY_RUN
from tests.warm_python import kill, warm_python
from tests.xla import environment, slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of all commands; `train` is told to go once after its first checkpoint and started again."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    command("cold_start", folder).check_returncode()
    process = subprocess.Popen(line("train", folder), env=environment(), stderr=subprocess.DEVNULL)
    while not (folder / "checkpoints" / "aepo" / "1").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    for name in ("train", "evaluate", "convert", "report"):
        result = command(name, folder)
        assert result.returncode == 0, result.stderr[-2000:]
    return folder


def line(name, folder, python=None, **changes):
    flags = [f"--config.{key}={value}" for key, value in (TINY_RUN | changes).items()]
    command = [python or warm_python(), "-m", f"ares_jax.{name}"]
    return [*command, "--config=configs/digits_cpu.py", f"--workdir={folder}", *flags]


def command(name, folder, **changes):
    return subprocess.run(line(name, folder, **changes), env=environment(), capture_output=True, text=True)


def test_a_killed_run_resumes_without_gaps(workdir):
    steps = [record["step"] for record in read_jsonl(workdir / "aepo" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]
    assert {r["step"] for r in read_jsonl(workdir / "aepo" / "rollouts.jsonl")} == {1, 2, 3}


@pytest.mark.parametrize("kills", [3, slow(10)])
def test_killed_at_random_moments_the_weights_are_the_same_to_the_last_bit(workdir, tmp_path, kills):
    """On-policy. A moment may be anywhere: while the sampler starts, in a rollout, an update, a save.

    The trees arrive at the sampler in any order, so it rounds alike only if it draws in one shape.
    """
    exact = {"sampler.one_shape": True}
    folder = tmp_path / "killed"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(workdir / "checkpoints" / "cold_start", folder / "checkpoints" / "cold_start")
    shutil.copytree(workdir / "tokenizer", folder / "tokenizer")
    rng = np.random.default_rng()
    begin = time.monotonic()
    result = command("train", folder, **exact)  # once without a kill: how long it takes
    assert result.returncode == 0, result.stderr[-2000:]
    whole = time.monotonic() - begin
    expected = final_weights(folder)
    shutil.rmtree(folder / "aepo")
    shutil.rmtree(folder / "checkpoints" / "aepo")
    for _ in range(kills):
        process = subprocess.Popen(line("train", folder, **exact), env=environment(), stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, whole))
        if process.poll() is None:
            kill(process)
        assert process.returncode in (0, -signal.SIGKILL)
    result = command("train", folder, **exact)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, value in final_weights(folder).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def final_weights(folder):
    workspace = open_run(get_config(str(folder / "config.json")), folder)
    assert workspace.checkpoints("aepo").latest() == TINY_RUN["aepo.steps"]
    return workspace.params("aepo")


def test_a_finished_command_has_nothing_left_to_do(workdir):
    before = (workdir / "aepo" / "metrics.jsonl").read_text()
    assert command("train", workdir).returncode == 0
    assert (workdir / "aepo" / "metrics.jsonl").read_text() == before


def test_every_stage_is_evaluated_and_reported(workdir):
    for name in ("base", "cold_start", "aepo"):
        levels = json.loads((workdir / "evaluation" / f"{name}.json").read_text())["levels"]
        assert {level: value["problems"] for level, value in levels.items()} == {"easy": 2, "medium": 2, "hard": 2}
    page = (workdir / "report.html").read_text()
    assert page.count("Not yet measured.") == 0 and "cold start" in page


def test_aepo_begins_with_published_weights_where_there_is_no_cold_start(workdir, tmp_path):
    folder = tmp_path / "direct"
    result = command("train", folder, **{"model.pretrained": workdir / "export", "aepo.steps": 1})
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"AEPO: no cold start in {folder}; it starts from {workdir / 'export'} as it is" in result.stdout
    assert "Goodput " in result.stdout and "start-up: imports" in result.stdout
    first, last = (read_jsonl(run / "aepo" / "metrics.jsonl")[at] for run, at in ((folder, 0), (workdir, -1)))
    assert first["validation/length/easy"] == last["validation/length/easy"]  # the same model, the same seeds
    assert [record["step"] for record in read_jsonl(folder / "aepo" / "metrics.jsonl")] == [0, 1]


def test_an_evaluation_told_to_go_keeps_its_answers_and_the_next_one_compiles_nothing(workdir, tmp_path):
    """With the cache of compiled programs that a command has by itself: the tests' own is not theirs."""
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns("evaluation", "export"))
    mine = {name: value for name, value in environment().items() if not name.startswith("JAX_") or name == "JAX_PLATFORMS"}
    mine |= {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}

    def cached():
        log = (folder / "sampler.log").read_text()
        return [log.lower().count(f"persistent compilation cache {what}") for what in ("hit", "miss")]

    process = subprocess.Popen(line("evaluate", folder, sys.executable), env=mine, stderr=subprocess.PIPE, text=True)
    kept = folder / "evaluation" / "base.0.jsonl"
    while not read_jsonl(kept) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 0 and "stopped: all that was done is on disk" in said, said[-2000:]
    (hits, misses), (first, *rest) = cached(), read_jsonl(kept)
    assert misses > hits and any((folder / "compilation_cache").iterdir())
    lines = [json.dumps(line) + "\n" for line in ({**first, "response": "kept"}, *rest)]
    kept.write_text("".join(lines) + '{"index": 5, "resp')  # a kill cuts a line off
    result = subprocess.run(line("evaluate", folder, sys.executable), env=mine, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    samples = json.loads((folder / "evaluation" / "base.json").read_text())["samples"]
    assert samples[first["index"]]["response"] == "kept"
    for name in ("cold_start", "aepo"):
        mine, expected = (json.loads((run / "evaluation" / f"{name}.json").read_text()) for run in (folder, workdir))
        assert mine == expected
    assert cached()[0] > hits and cached()[1] < misses
    assert not list((folder / "evaluation").glob("*.jsonl"))


def test_the_export_is_the_model(workdir):
    workspace = open_run(get_config(str(workdir / "config.json")), workdir)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(workdir / "export").eval()
    text, pixels = load_processors(workdir / "export")
    assert pixels.size == workspace.encoder.image_processor.size and len(text) == len(workspace.tokenizer)
    prompt, ours = workspace.encoder(workspace.problems("test")[2]), workspace.load("aepo")
    layout = vision_layout(prompt.grid_thw)
    vision = VisionInputs(prompt.patches[None], layout.position_hw[None], layout.window_ids[None], layout.frame_ids[None])
    hidden = ours(
        jnp.array(prompt.token_ids[None]), prompt.positions[None], jnp.ones((1, len(prompt.token_ids)), int), vision
    )
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(prompt.token_ids[None]).long(), pixel_values=torch.tensor(np.asarray(prompt.patches)),
            image_grid_thw=torch.tensor(prompt.grid_thw).long(),
            mm_token_type_ids=torch.tensor(prompt.token_ids[None] == theirs.config.image_token_id).int(),
        ).logits[0]  # fmt: skip
    np.testing.assert_allclose((hidden @ ours.head.T)[0], expected, atol=2e-4)
