"""A made-up run: every section is there, numbers are the files', nothing is fetched, nothing breaks when files miss."""

import json
import signal

import pytest
from absl import flags
from absl.testing import flagsaver

from ares_jax.commands import report
from ares_jax.reporting import build_report, console_table


def write_run(folder):
    (folder / "aepo").mkdir(parents=True)
    (folder / "cold_start").mkdir()
    (folder / "evaluation").mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": 3}))
    (folder / "stages.json").write_text(json.dumps([{"name": "AEPO", "seconds": 12.0, "tokens": 345, "detail": {}}]))
    levels = {
        level: {"problems": 300, "correct": k, "accuracy": k / 300, "interval": [0.1, 0.9], "mean_tokens": 20.5}
        for level, k in (("easy", 270), ("medium", 201), ("hard", 99))
    }
    sample = {
        "problem_id": "p", "level": "easy", "question": "<b>1</b>?", "answer": "7", "tokens": 5,
        "correct": True, "image": "data:image/png;base64,AAAA", "response": "<think>x</think>",
    }  # fmt: skip
    for name in ("base", "cold_start"):
        result = {"name": name, "split": "test", "temperature": 0.5, "levels": levels, "samples": [sample]}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    step = {
        "step": 1, "time": 0.0, "reward/mean": 0.5, "leaves": 8, "branches": 2, "tokens/shared": 30, "tokens/computed": 70,
        "validation/accuracy/easy": 0.9, "kl/easy": 0.1, "time/step": 11.0, "time/sample": 8.0, "time/wait": 2.0,
        "time/learn": 9.0, "time/push": 0.0, "overlap": 0.75, "tokens_per_second/step": 50.0,
        "goodput": 0.625,
    }  # fmt: skip
    (folder / "aepo" / "metrics.jsonl").write_text(json.dumps(step) + '\n{"step": 2, "ti')  # a killed run's last line
    leaf = {
        "tokens": [" so", "<", " 7"], "entropies": [0.1, 1.2, 0.3], "window_means": [0.5, 0.0, 0.0],
        "window_mask": [False, True, False], "parent": -1, "branch_position": 0, "reward": 1.0, "correct": True,
    }  # fmt: skip
    branch = {**leaf, "parent": 0, "branch_position": 1, "correct": False}
    record = {
        "step": 1, "problem_id": "p", "level": "hard", "question": "q", "answer": "7", "image": None, "tau_high": 0.4,
        "leaves": [leaf, branch],
    }  # fmt: skip
    (folder / "aepo" / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    bracket = {"pass_rate": 0.5, "problems": 9, "selected": 4, "length_before": 30.0, "length_after": 20.0}
    curation = {
        "brackets": [bracket], "lengths": {"digits": {"at_0": 40.0, "at_1": 20.0}}, "correlation_before": 0.1,
        "correlation_after": 0.7,
    }  # fmt: skip
    (folder / "cold_start" / "curation.json").write_text(json.dumps(curation))


def test_the_page_holds_everything_and_fetches_nothing(tmp_path):
    write_run(tmp_path)
    page = build_report(tmp_path).read_text()
    for text in (
        "90.0%",
        "67.0%",
        "2 of 8 leaves are branches (25%)",
        "30 of 100 tokens",
        "branch of 0",
        "0.70 after",
        "8 s, 75%",
        "Goodput 62%: that much of the time",
    ):
        assert text in page
    assert "http" not in page and "<b>1</b>?" not in page and "&lt;b&gt;1" in page
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == {
        "training", "entropy", "reward", "kl", "curation", "time",
    }  # fmt: skip
    assert "90.0% [10.0%, 90.0%] 20.5 tok" in console_table(tmp_path)


def test_an_empty_run_is_no_error(tmp_path):
    page = build_report(tmp_path).read_text()
    assert page.count("Not yet measured.") >= 5
    assert "Not yet measured" in console_table(tmp_path)


def test_an_interrupt_while_the_page_is_made_ends_the_following_and_leaves_a_whole_page(tmp_path, monkeypatch):
    write_run(tmp_path)
    reloaded = []

    def interrupted(folder, *, reload_every=0):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as a callback of a library would
            pass
        reloaded.append(reload_every)
        return build_report(folder, reload_every=reload_every)

    monkeypatch.setattr(report, "build_report", interrupted)
    flags.FLAGS.mark_as_parsed()
    before = signal.getsignal(signal.SIGINT)
    try:
        with flagsaver.flagsaver(follow=1), pytest.raises(KeyboardInterrupt):
            report.main(None, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert reloaded == [1, 0] and "location.reload" not in (tmp_path / "report.html").read_text()
