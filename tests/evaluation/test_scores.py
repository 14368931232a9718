"""Intervals and comparisons: against closed forms, and that they see what is paired."""

import json

import numpy as np
import pytest

from ares_jax.commands.arguments import plain_arguments
from ares_jax.errors import UserError
from ares_jax.evaluation.benchmark import Graded, Metric, Sample
from ares_jax.evaluation.benchmarks import BENCHMARKS
from ares_jax.evaluation.compare import compared, load_results, paired_difference, plot, table
from ares_jax.evaluation.report import line
from ares_jax.evaluation.scores import Answered, by_group, by_length, measured
from ares_jax.metrics import write_json


def answers(scores, *, units=None, lengths=None):
    return [
        Answered(
            Graded(Sample(f"s{i}", (), "", unit=units[i] if units else "", groups={"half": "ab"[i % 2]}), float(score)),
            lengths[i] if lengths else i,
        )
        for i, score in enumerate(scores)
    ]


def test_the_interval_is_that_of_a_binomial_share():
    rng = np.random.default_rng(0)
    found = measured((Metric("accuracy"),), answers(rng.random(400) < 0.7))["accuracy"]
    half = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 400)
    np.testing.assert_allclose(found["interval"], [found["value"] - half, found["value"] + half], atol=0.01)


def test_answers_of_one_unit_are_resampled_together():
    scores = np.repeat(np.arange(40) % 2, 16)  # 40 problems, the same verdict 16 times
    alone = measured((Metric("accuracy"),), answers(scores))["accuracy"]["interval"]
    together = measured((Metric("accuracy"),), answers(scores, units=[str(i // 16) for i in range(640)]))["accuracy"]
    width = together["interval"][1] - together["interval"][0]
    assert together["units"] == 40 and width == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), rel=0.15)
    assert width > 3 * (alone[1] - alone[0])


def test_nothing_answered_has_no_score():
    assert measured((Metric("accuracy"),), [])["accuracy"] == {"value": None, "interval": None, "units": 0}
    assert by_length([]) == {} and by_group([]) == {}


def test_groups_and_lengths():
    found = by_group(answers([1, 0, 1, 0]))["half"]
    assert found["a"]["accuracy"] == 1 and found["a"]["interval"] == [1, 1] and found["b"]["accuracy"] == 0
    quartiles = by_length(answers([1] * 50 + [0] * 50))
    assert [part["accuracy"] for part in quartiles.values()] == [1, 1, 0, 0]
    assert sum(part["answers"] for part in quartiles.values()) == 100 and next(iter(quartiles)).startswith("0 to ")
    assert [part["answers"] for part in by_length(answers([1, 0], lengths=[5, 5])).values()] == [2]


def test_a_difference_is_significant_where_the_pairs_say_so():
    rng = np.random.default_rng(1)
    a = (rng.random(600) < 0.5).astype(float)
    better = np.where(rng.random(600) < 0.06, 1.0, a)  # a few more right, none lost: clear in pairs
    shuffled = rng.permutation(better)  # the same accuracies, unpaired: not clear
    groups = [{}] * 600
    (low, high), p = paired_difference(a, better, groups)
    assert low > 0 and p < 0.01 and low < better.mean() - a.mean() < high
    assert paired_difference(a, shuffled, groups)[1] > 0.05
    assert paired_difference(a, a, groups) == ((0.0, 0.0), 1.0)


def test_a_random_difference_is_rarely_significant():
    rng = np.random.default_rng(2)
    ps = [paired_difference(*(rng.random((2, 60)) < 0.5).astype(float), [{}] * 60)[1] for _ in range(60)]
    assert np.mean(np.array(ps) < 0.05) < 0.12 and 0.3 < np.mean(ps) < 0.7


def results(folder, model, rights, length, name="math_500", error=()):
    lines = [
        {"id": f"s{i}", "unit": f"s{i}", "groups": {}, "answer": "1", "response": "x" * length, "tokens": length,
         "correct": None if i in error else bool(right), "error": "HTTP 500" if i in error else None}
        for i, right in enumerate(rights)
    ]  # fmt: skip
    result = {"benchmark": name, "model": model, "metrics": {"length_unit": "tokens"}, "results": lines}
    write_json(folder / f"{model}___{name}.json", result)


def test_two_runs_side_by_side(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    results(a, "base", [0, 0, 1, 0, 1, 0, 0, 0, 0, 0], 100)
    results(b, "ares", [1, 1, 1, 1, 1, 1, 1, 1, 0, 1], 70, error=(9,))
    results(b, "ares", [1], 5, name="gsm8k")  # only in one
    rows = compared(load_results(a), load_results(b), BENCHMARKS)
    assert [(row.benchmark, row.units, row.length_a, row.length_b) for row in rows] == [("math_500", 9, 100, 70)]
    assert (rows[0].a, rows[0].b) == (pytest.approx(2 / 9), pytest.approx(8 / 9)) and rows[0].p < 0.05
    text = table(rows, ("a", "b"))
    assert "| math_500 | accuracy | 9 | 22.2 | 88.9 | +66.7 [" in text and " * |" in text
    plot(rows, ("a", "b"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert load_results(b / "ares___gsm8k.json").keys() == {"gsm8k"}


def test_what_cannot_be_compared_is_named(tmp_path):
    results(tmp_path / "a", "base", [1], 5)
    results(tmp_path / "b", "base", [1], 5, name="gsm8k")
    a, b = load_results(tmp_path / "a"), load_results(tmp_path / "b")
    with pytest.raises(UserError, match="no benchmark and unit is in both: math_500 and gsm8k"):
        compared(a, b, BENCHMARKS)
    results(tmp_path / "a", "other", [1], 5)
    with pytest.raises(UserError, match="holds math_500 of base and other; name one file"):
        load_results(tmp_path / "a")
    with pytest.raises(UserError, match="holds no <model>___<benchmark>.json"):
        load_results(tmp_path)
    (tmp_path / "x___y.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="is no results file"):
        load_results(tmp_path)


def test_the_line_on_the_console_says_what_is_neither_right_nor_wrong():
    metrics = {
        "scores": {"worst": {"value": 0.5, "interval": [0.25, 0.75]}, "none": {"value": None, "interval": None}}, "total": 8,
        "mean_length": 12.4, "length_unit": "tokens", "errors": 2, "undecided": 1, "cut_off": 0,
    }  # fmt: skip
    text = line({"title": "DynaMath", "metrics": metrics})
    assert text.startswith("DynaMath: worst 50.0 [25.0, 75.0]; none none (8 answers, 12 tokens each, 2 not answered")
    assert "1 that rules cannot decide" in text and "cut off" not in text


@pytest.mark.parametrize(
    "given, plain",
    [
        (["--model-name", "a-b", "--top-p=0.9"], ["--model_name", "a-b", "--top_p=0.9"]),
        (["--compare", "a-1", "b-2"], ["--compare=a-1,b-2"]),
        (["--compare=a", "b", "--max-tokens=5"], ["--compare=a,b", "--max_tokens=5"]),
        (["--config=configs/x.py", "--config.aepo.steps=3", "--workdir=a-b"], None),
    ],
)
def test_flags_may_be_written_with_dashes(given, plain):
    assert plain_arguments(["evaluate", *given]) == ["evaluate", *(given if plain is None else plain)]
