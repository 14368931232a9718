"""Mining of trigger words: what counts as a word, the ranking, the command, and the vocabulary that a run then uses."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from ares_jax.commands.triggers import main, mine, own_means, word_at
from ares_jax.errors import UserError
from ares_jax.sampling.trigger_words import read_words
from configs.digits_cpu import get_config


@pytest.mark.parametrize(
    "tokens, word",
    [
        ((" ", "wait", ","), "wait"), ((",", " Wait", " so"), "wait"), (("", "ĠWait", "Ġso"), "wait"), (("\n", "So"), "so"),
        (("<think>", "Okay", ","), "okay"), ((".", "▁However", "▁the"), "however"),
        ((" rec", "heck"), None), ((" ", "rec", "heck"), None), ((" un", "less", " x"), None),  # pieces
        ((" ", "7", " "), None), ((" ", "42nd", " "), None), ((" ", "x", " "), None), ((" ", ",", " "), None),
        (("\\", "frac", "{"), None), (("<", "image", ">"), None), (("[", "BLANK", "]"), None), ((" ", "var", "_1"), None),
        ((" ", "", " "), None), ((" ", "等", " "), None),
    ],
)  # fmt: skip
def test_words_and_what_is_none(tokens, word):
    assert word_at(tokens, 1) == word


def test_a_response_begins_with_a_word():
    assert word_at(("Okay", ",", " so"), 0) == "okay" and word_at((" so",), 0) == "so"


def test_words_rank_by_mean_window_entropy():
    """By hand, windows of 2: wait starts windows of 2.0 and 1.0, so 3.0 once; so 0.5; the last token starts none."""
    leaves = [
        ([" wait", " so", " wait", " so"], np.array([2.0, 0.5, 1.0, 9.0])),
        ([" hmm", " so", " then", " 7", " x", " wait"], np.array([3.0, 0.5, 0.1, 8.0, 8.0, 9.0])),
    ]
    ranked = mine(leaves, window=2, least=1, count=10)
    assert [(r.word, r.entropy, r.windows) for r in ranked] == [
        ("hmm", 3.0, 1), ("wait", 1.5, 2), ("so", 0.5, 2), ("then", 0.1, 1),
    ]  # fmt: skip
    assert [r.word for r in mine(leaves, window=2, least=2, count=1)] == ["wait"]
    assert mine([], window=2, least=1, count=5) == []


def test_a_shared_prefix_counts_once():
    leaf = {"tokens": [" so", " wait", " now"], "window_means": [1.0, 2.0, 0.0], "branch_position": 1}
    assert [(r.word, r.windows) for r in mine([(leaf["tokens"], own_means(leaf))], window=1, least=1, count=9)] == [
        ("wait", 1), ("now", 1),
    ]  # fmt: skip


def test_the_command_writes_a_vocabulary_that_a_run_takes(tmp_path, capsys):
    leaf = {"tokens": [" wait", " 7", " then", " 8"] * 10, "window_means": [2.0, 9.0, 1.0, 9.0] * 10, "branch_position": 0}
    rollouts = tmp_path / "aepo" / "rollouts.jsonl"
    rollouts.parent.mkdir()
    rollouts.write_text(json.dumps({"leaves": [leaf]}) + "\n")
    flags.FLAGS.mark_as_parsed()
    config = get_config()
    config.aepo.window = 4
    with flagsaver.flagsaver(least=5):
        main(config, tmp_path)
    assert "wait           * 2.000       10" in capsys.readouterr().out
    words = tmp_path / "cold_start" / "triggers.txt"
    assert words.read_text() == "wait\nthen\n" and read_words(words) == {"wait", "then"}
    with flagsaver.flagsaver(least=11), pytest.raises(UserError, match="no word starts 11 windows in 1 responses"):
        main(config, tmp_path)
    with flagsaver.flagsaver(rollouts=["gone.jsonl"]), pytest.raises(UserError, match="gone.jsonl: no such file"):
        main(config, tmp_path)


def test_a_missing_or_empty_list_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("gone.txt", "empty.txt"):
        with pytest.raises(UserError, match=f"{name}: no file with a word a line"):
            read_words(tmp_path / name)
