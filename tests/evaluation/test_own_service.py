"""The harness drives our own service: a checkpoint's, started by the command, asked by a hundred threads."""

import json
import subprocess

import pytest

from ares_jax.checkpoints import save_hf
from ares_jax.config import to_plain
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl
from ares_jax.run.local_service import _identity, local_service
from configs.digits_cpu import get_config
from data_pipeline.tokenizer import save_processors
from tests import digits
from tests.warm_python import warm_python
from tests.xla import environment


def evaluated(command, results):
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(results.read_text())


def test_a_local_checkpoint_is_asked_by_a_hundred_threads_and_none_is_lost(tmp_path):
    config = get_config()
    with config.unlocked():
        config.model.text.update(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1)
        config.model.text.mrope_section = (2, 3, 3)
        config.sampler.update(slots=64, pages=2000, max_prompt_tokens=64, max_response_tokens=16)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)  # no stage is trained: random weights
    (run / "config.json").write_text(json.dumps(to_plain(config)))
    command = [
        warm_python(), "-m", "ares_jax.evaluate", f"--checkpoint={run}", "--datasets=digits", "--system-prompt=",
        "--max-tokens=8", "--eval-threads=100", "--limit=120", f"--output-dir={tmp_path}",
    ]  # fmt: skip
    metrics = evaluated(command, tmp_path / "run___digits.json")["metrics"]
    assert metrics["total"] == 120 and metrics["errors"] == 0 and 120 <= metrics["tokens"] <= 8 * 120
    (cache,) = (tmp_path / "cache").glob("*.jsonl")
    assert len(read_jsonl(cache)) == 120


def test_a_published_folder_is_asked_with_its_own_pixels_and_new_weights_anew(tmp_path):
    """The folder alone says all that is needed; its answers are kept until a file of it changes."""
    folder = tmp_path / "published"
    save_processors(folder, digits.encoder().tokenizer, digits.encoder().image_processor)
    save_hf(digits.model(), folder)
    command = [
        warm_python(), "-m", "ares_jax.evaluate", f"--checkpoint={folder}", "--datasets=digits", "--system-prompt=",
        "--max-tokens=4", "--limit=3", "--min-pixels=0", "--temperature=0", f"--output-dir={tmp_path}",
    ]  # fmt: skip
    result = evaluated(command, tmp_path / "published___digits.json")
    assert result["metrics"]["total"] == 3 and result["metrics"]["errors"] == 0
    path = tmp_path / "service" / "published" / "config.json"
    config = json.loads(path.read_text())
    assert config["data"]["min_pixels"] == 784 and config["sampler"]["max_response_tokens"] == 4
    seen = {_identity(folder, path)}
    (folder / "model.safetensors").touch()
    seen.add(_identity(folder, path))
    for section, changes in {"sampler": {"slots": 3}, "data": {"max_pixels": 785}, "model": {"dtype": "float32"}}.items():
        config[section].update(changes)
        path.write_text(json.dumps(config))
        seen.add(_identity(folder, path))
    assert len(seen) == 4  # the same with other slots


def test_a_run_is_asked_with_its_own_config_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--config does not go with .* a run has its own"):
        with local_service(tmp_path, get_config(), tmp_path, 8):
            pass
