"""The trigger vocabulary."""

from ares_jax.sampling.trigger_words import WORDS, normalized, trigger_mask


def test_markers_and_case_do_not_matter():
    for token in ("Wait", "ĠWait", "▁wait", " WAIT", "wait ", "\nwait"):
        assert normalized(token) == "wait"
    assert trigger_mask(["ĠHowever", "however", "howeve", "Ġ", "", "7", "a", "<|image_pad|>", "Ġ="]).tolist() == [
        True, True, False, False, False, False, False, False, False,
    ]  # fmt: skip
    assert trigger_mask([]).shape == (0,)


def test_the_list_holds_neither_digits_nor_letters():
    assert all(word.isalpha() and word.islower() and len(word) > 1 for word in WORDS)
    assert trigger_mask(["Ġmaybe", "x"], frozenset({"x"})).tolist() == [False, True]
