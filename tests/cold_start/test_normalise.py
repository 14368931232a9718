"""Traces of many shapes, what they become, and why some are not used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.cold_start.normalise import KEPT, REJECTS, REWRITTEN, normalise
from ares_jax.rewards.grading import has_format, is_correct
from data_pipeline import digits


@pytest.mark.parametrize(
    "response, verdict, text",
    [
        (r"<think>3+4</think>\boxed{7}", KEPT, r"<think>3+4</think>\boxed{7}"),
        ("<think>3+4</think>\nSo it is\n\\boxed{7}. ", KEPT, "<think>3+4</think>\nSo it is\n\\boxed{7}. "),
        (r"3+4</think>\boxed{7}", REWRITTEN, r"<think>3+4</think>\boxed{7}"),
        (r"<thinking>3+4</thinking>\boxed{7}", REWRITTEN, r"<think>3+4</think>\boxed{7}"),
        (r"◁think▷3+4◁/think▷\boxed{7}", REWRITTEN, r"<think>3+4</think>\boxed{7}"),
        (
            "<|begin_of_thought|>3+4<|end_of_thought|><|begin_of_solution|>\\boxed{7}<|end_of_solution|>", REWRITTEN,
            r"<think>3+4</think>\boxed{7}",
        ),
        ("<think>3+4</think><answer>7</answer>", REWRITTEN, "<think>3+4</think>\n\\boxed{7}"),
        ("<think>3+4</think>Adding.\nThe final answer is: **7**.", REWRITTEN, None),
        (r"<think>3+4 is \boxed{7}</think>", REWRITTEN, "<think>3+4 is \\boxed{7}</think>\n\\boxed{7}"),
        ("Sure! <think>3+4</think>\\boxed{7}", REWRITTEN, "<think>Sure!\n3+4</think>\\boxed{7}"),
        (r"3+4 makes \boxed{7}", REWRITTEN, "<think>\n3+4 makes \\boxed{7}\n</think>\n\\boxed{7}"),
        ("Adding 3 and 4.\n#### 7", REWRITTEN, "<think>\nAdding 3 and 4.\n#### 7\n</think>\n\\boxed{7}"),
        ("Adding 3 and 4.\nAnswer: 7", REWRITTEN, None), ("One to two, so.\nAnswer: 7:2 ", "wrong_answer", None),
        (r"<think>3+4</think>\boxed{8}", "wrong_answer", None), (r"3+4 makes \boxed{8}", "wrong_answer", None),
        ("<think>3+4</think>who knows", "no_answer", None), ("who knows", "no_answer", None),
        (r"<think>3+4 is \boxed{7}", "unclosed_thought", None),
        (r"<think>3</think><think>4</think>\boxed{7}", "several_thoughts", None),
        (r"<think> </think>\boxed{7}", "no_thought", None), (r"\boxed{7}", "no_thought", None),
        ("The final answer is \\boxed{7}.", "no_thought", None), ("#### 7", "no_thought", None),
        ("", "empty", None), (" \n", "empty", None),
    ],
)  # fmt: skip
def test_each_shape_has_its_verdict(response, verdict, text):
    result = normalise(response, "7")
    assert result.verdict == verdict
    if text is not None:
        assert result.text == text
    assert (result.text is None) == (verdict in REJECTS)


def test_a_cut_response_is_rejected_though_its_answer_is_right():
    assert normalise(r"<think>3+4</think>\boxed{7}", "7", "length").verdict == "truncated"


def test_the_digits_teacher_is_kept_byte_for_byte():
    source = digits.DigitsSource("train", 30, seed=0)
    for problem in (source[i] for i in range(30)):
        assert [normalise(r, problem.answer).text for r in problem.responses] == list(problem.responses)


PIECES = [
    "<think>",
    "</think>",
    "<thinking>",
    "</thinking>",
    "<answer>",
    "</answer>",
    "3+4",
    "\n",
    r"\boxed{7}",
    "#### 7",
    "}",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, r"\boxed{8}", "answer: 7", " "]), max_size=8).map("".join))
def test_what_is_used_has_the_form_and_is_right_and_stays_as_it_is(response):
    result = normalise(response, "7")
    assert result.verdict in {KEPT, REWRITTEN, *REJECTS}
    if result.text is not None:
        assert has_format(result.text) and is_correct(result.text, "7")
        again = normalise(result.text, "7")
        assert (again.verdict, again.text) == (KEPT, result.text)
