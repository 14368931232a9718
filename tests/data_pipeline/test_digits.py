import numpy as np
import pytest

from ares_jax.rewards.grading import extract_answer, has_format, is_correct
from data_pipeline import digits, tokenizer
from tests.digits import encoder


def test_no_test_scan_is_seen_in_training():
    scans = {split: {scan.tobytes() for scan in digits.scans_of(split)[0]} for split in digits.SPLITS}
    assert sum(len(digits.scans_of(split)[1]) for split in digits.SPLITS) == 1797
    assert not scans["train"] & scans["test"] and not scans["train"] & scans["validation"]
    assert not scans["validation"] & scans["test"]


def test_problems_are_deterministic_and_every_trace_is_right():
    source = digits.DigitsSource("train", 90, seed=3)
    lengths, short = {level: [] for level in digits.LEVELS}, {level: [] for level in digits.LEVELS}
    for i in range(90):
        problem, again = source[i], digits.DigitsSource("train", 90, seed=3)[i]
        assert problem.question == again.question and np.array_equal(problem.images[0], again.images[0])
        assert all(has_format(r) and is_correct(r, problem.answer) for r in problem.responses)
        tokens = [len(encoder().encode_response(r)) for r in problem.responses]
        lengths[problem.level].append(max(tokens))
        short[problem.level].append(np.mean([size <= 17 for size in tokens]))
    assert np.mean(short["easy"]) > 0.6 and np.mean(short["medium"]) < 0.4 and np.mean(short["hard"]) < 0.3
    assert np.mean(lengths["easy"]) < np.mean(lengths["medium"]) < np.mean(lengths["hard"]) <= 120


def test_a_digit_is_one_merged_vision_token():
    prompt = encoder()(digits.DigitsSource("train", 3, seed=0)[2])
    cards = prompt.picture().shape[0] // 28 * (prompt.picture().shape[1] // 28)
    assert (prompt.token_ids == encoder().tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == cards
    assert len(prompt.patches) == 4 * cards


def test_the_tokenizer_survives_its_folder(tmp_path):
    tokenizer.save_processors(tmp_path / "t", encoder().tokenizer, encoder().image_processor)
    loaded, pixels = tokenizer.load_processors(tmp_path / "t")
    text = "<think> first 7 wait, let me check:</think>\\boxed{42}"
    assert loaded.encode(text) == encoder().tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert len(loaded.encode("<think>")) == len(loaded.encode(" wait")) == len(loaded.encode(" 7")) == 1
    image = digits.DigitsSource("test", 1, seed=0)[0].images[0]
    features = [p([image], return_tensors="np")["pixel_values"] for p in (pixels, encoder().image_processor)]
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("<think>\\boxed{1}</think>\\boxed{7}", "7", True), ("\\boxed{7", "7", False), ("7", "7", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True), ("\\boxed{07}", "7", True), ("\\boxed{x+y}", "y+x", True),
        ("\\boxed{\\text{seven}}", "7", False),
    ],
)  # fmt: skip
def test_grading(response, answer, right):
    assert is_correct(response, answer) is right
    assert extract_answer("no box") is None
