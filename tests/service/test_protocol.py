"""Requests over the wire: what is equal after a round trip, and what must never reach the engine."""

import dataclasses
import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from ares_jax.service.protocol import (
    GroupModel,
    decode_array,
    decode_group,
    decode_request,
    encode_array,
    encode_group,
    encode_request,
)
from tests.service import fake


def wire(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("tau", [math.inf, 1.25])
def test_a_request_is_equal_after_a_round_trip(tau):
    sent = dataclasses.replace(fake.request(7, patches=8), tau_high=tau)
    got = decode_request(GroupModel.model_validate(wire(encode_request(sent))))
    for name, value in vars(sent).items():
        np.testing.assert_array_equal(getattr(got, name), value)
        assert not isinstance(value, np.ndarray) or getattr(got, name).dtype == value.dtype


def test_a_group_is_equal_after_a_round_trip_also_without_tokens():
    for tokens in (0, 5):
        sent = fake.group(fake.request(3, tokens=tokens))
        got = decode_group(wire(encode_group(sent)))
        for a, b in zip(got.leaves, sent.leaves, strict=True):
            assert all(np.array_equal(getattr(a, name), value) for name, value in vars(b).items())


def test_the_bytes_are_little_endian_in_row_order():
    value = encode_array(np.array([[1, 2], [3, 4]], np.int32).T)
    assert value == {"dtype": "int32", "shape": [2, 2], "data": "AQAAAAMAAAACAAAABAAAAA=="}
    assert decode_array(value, "int32").tolist() == [[1, 3], [2, 4]]


def array(values, dtype=np.int32):
    return encode_array(np.array(values, dtype))


@pytest.mark.parametrize(
    "change",
    [
        {"patches": {"dtype": "float32", "shape": [], "data": "AAAAAA=="}},
        {"token_ids": {"dtype": "int32", "shape": [], "data": "AAAAAA=="}},
        {"token_ids": array([])},
        {"token_ids": array(range(10), np.float32)},
        {"token_ids": {"dtype": "int64", "shape": [0], "data": ""}},
        {"token_ids": {"dtype": "int32", "shape": [2**62, 4], "data": ""}},
        {"token_ids": {"dtype": "int32", "shape": [-1, -1], "data": "AAAAAA=="}},
        {"token_ids": {"dtype": "int32", "shape": [1], "data": "é"}},
        {"positions": array([[0] * 9] * 3)},
        {"grid_thw": array([[1, 2, 4]])},  # 8 patches instead of 4
        {"grid_thw": array([[1, 1, 4]])},  # cannot be merged 2 x 2
        {"grid_thw": array([[1, -2, -2]])},
        {"grid_thw": array([[1, 2, 2], [0, 2**30, 2**30]])},
        {"grid_thw": array([[2**30, 2**30, 2**30]])},  # the product overflows to 0
    ],
)
def test_arrays_that_would_break_the_engine_are_value_errors(change):
    good = encode_request(fake.request(1, patches=4))
    decode_request(GroupModel.model_validate(good))
    with pytest.raises(ValueError):
        decode_request(GroupModel.model_validate({**good, **change}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 2**31, None, "x"])
@pytest.mark.parametrize("name", ["temperature", "top_k", "seed", "max_new_tokens", "group_size"])
def test_options_are_finite_and_fit_the_engines_integers(name, value):
    if name == "temperature" and value == 2**31:
        return
    with pytest.raises(ValidationError, match=name):
        GroupModel.model_validate({**encode_request(fake.request(1)), name: value})


def test_rope_delta_fits_the_engines_integers():
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(ValidationError, match="rope_delta"):
            GroupModel.model_validate({**encode_request(fake.request(1)), "rope_delta": value})
