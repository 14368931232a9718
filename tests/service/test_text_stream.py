"""Text as it is drawn: the same as all at once, and never a part of a stop string."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from ares_jax.sampling.stops import stop_bytes, tokens_until_stop
from ares_jax.service.text_stream import TextStream
from data_pipeline.tokenizer import token_bytes
from tests import digits

TOKENIZER = digits.encoder().tokenizer
TABLE = token_bytes(TOKENIZER)
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)


def pushed(ids, stops=()):
    stream, pieces = TextStream(TABLE, stops), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


@given(IDS)
@settings(deadline=None)
def test_pieces_join_to_what_the_tokenizer_decodes(ids):
    pieces, stopped = pushed(ids)
    assert not stopped
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.text(alphabet="ab<é世🙂", max_size=12), st.lists(st.text(alphabet="ab<é世", min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_the_text_ends_before_the_first_stop_string(text, stops):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(pushed(ids)[0]) == text
    pieces, stopped = pushed(ids, stops)
    got = "".join(pieces)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(got) and not any(stop in got for stop in stops)
    if len(stops) == 1:
        assert got == text.split(stops[0])[0]
    if not stopped:
        assert got == text
    ended = tokens_until_stop(np.array(ids, int), stop_bytes(stops), TABLE, seen=0)
    assert ended == (len(pieces) if stopped else None)  # the engine ends a leaf with the same token
    for seen in range(ended or len(ids)):
        assert tokens_until_stop(np.array(ids, int), stop_bytes(stops), TABLE, seen=seen) == ended


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    (a, b, x) = (TOKENIZER.encode(c, add_special_tokens=False)[0] for c in ("a", "b", "."))
    assert pushed([a, b, a, x, b], ["aba!", "b."]) == (["", "", "", "aba.", "", "b"], False)
    assert pushed([x, a, b], ["ab"]) == ([".", "", ""], True)


def test_a_character_of_several_tokens_comes_whole():
    ids = TOKENIZER.encode("世", add_special_tokens=False)
    assert len(ids) == 3
    assert pushed(ids)[0] == ["", "", "世", ""]
    assert "".join(pushed(ids[:2])[0]) == "�"
