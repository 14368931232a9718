"""Metrics: one line a step, whatever was interrupted; the same numbers in TensorBoard and Weights & Biases."""

import json
import math
import sys
import types

import pytest

from ares_jax.metrics import MetricsWriter, read_jsonl, stage


def test_steps_done_again_are_written_once(tmp_path):
    first = MetricsWriter(tmp_path, -1)
    for step in range(4):
        first.write(step, {"loss": step, "odd": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    second = MetricsWriter(tmp_path, 2)
    second.write(3, {"loss": 30})
    second.close()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["odd"] is None
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events


def test_weights_and_biases_where_its_key_is_set(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: run
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    MetricsWriter(tmp_path / "without", -1).write(1, {"loss": 2.0})
    assert logged == []
    monkeypatch.setenv("WANDB_API_KEY", "x")
    writer = MetricsWriter(tmp_path / "with", -1)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert logged == [(1, {"loss": 2.0}), "end"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)


def test_seconds_of_a_stage_add_up_over_attempts(tmp_path):
    for tokens in (5, 0, 7):
        with stage(tmp_path, "AEPO") as record:
            record["tokens"] = tokens
    (entry,) = json.loads((tmp_path / "stages.json").read_text())
    assert entry["tokens"] == 7 and entry["seconds"] > 0
