"""Frames: equal after a round trip, in any pieces, and nothing broken is read."""

import dataclasses
import json
import math
import struct

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ares_jax.service import frame
from ares_jax.service.frame import MEDIA_TYPE, FrameError, FrameStream
from ares_jax.service.protocol import frame_requests, frame_tree, unframe_requests, unframe_tree
from data_pipeline.pixels import pixel_patches
from tests.service import fake

ARRAYS = st.dictionaries(
    st.text(max_size=8),
    hnp.arrays(st.sampled_from([np.int32, np.float32, np.bool_, np.uint8]), hnp.array_shapes(min_dims=0, min_side=0)),
    max_size=5,
)  # fmt: skip
FIELDS = st.dictionaries(st.text(max_size=8), st.integers() | st.text() | st.none() | st.lists(st.booleans()), max_size=4)
GOOD = frame.encode({"a": 1}, {"x": np.arange(3, dtype=np.int32), "y": np.ones((2, 2), np.float32)})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(FIELDS, ARRAYS), max_size=3), st.integers(1, 97))
def test_frames_are_equal_after_a_round_trip_in_any_pieces(given, piece):
    data = b"".join(frame.encode(*one) for one in given)
    stream = FrameStream(limit=2**20)
    found = [one for i in range(0, len(data), piece) for one in stream.feed(data[i : i + piece])]
    assert [fields for fields, _ in found] == [fields for fields, _ in given]
    for (_, mine), (_, theirs) in zip(found, given, strict=True):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert mine[name].dtype == value.dtype and mine[name].shape == value.shape
            np.testing.assert_array_equal(mine[name], value)


def test_arrays_are_read_where_they_lie():
    data = bytearray(GOOD)
    x = frame.decode(memoryview(data)).arrays["x"]
    assert x.ctypes.data % 8 == np.frombuffer(data, np.uint8).ctypes.data % 8
    data[data.index(struct.pack("<i", 2))] = 7
    assert x.tolist() == [0, 1, 7]


def with_header(text):
    header = text.encode()
    return struct.pack("<8sIIQ", b"ARESJAX\n", 1, len(header), 24 + len(header) + 64) + header + bytes(64)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "0 bytes are no frame"),
        (GOOD[:20], "20 bytes are no frame"),
        (b"{" + GOOD[1:], "bytes that begin with b'{RESJAX"),
        (GOOD[:8] + struct.pack("<I", 9) + GOOD[12:], "a frame of version 9, this release reads 1; use the same release"),
        (GOOD[:-1], "the limit is"),
        (GOOD + b"x", "send it whole and nothing behind it"),
        (GOOD[:16] + struct.pack("<Q", 10 * 2**30) + GOOD[24:], "a frame of 10737418240 bytes, the limit is"),
        (GOOD[:12] + struct.pack("<I", 2**31) + GOOD[16:], "a header of 2147483648 bytes in a frame of"),
        (with_header("{"), "the header is not JSON"),
        (with_header("[" * 5000), "the header is not JSON"),
        (with_header('{"fields": {}}'), "the header is not JSON"),
        (with_header('{"fields": [], "arrays": {}}'), "the header is not JSON"),
        (with_header('{"fields": {}, "arrays": {"x": ["int32", 3, 0]}}'), "the header is not JSON"),
        *(
            (with_header(json.dumps({"fields": {}, "arrays": {"x": entry}})), said)
            for entry, said in (
                (["float64", [1], 96], "array x is float64"),
                (["int32", [-1], 96], "array x is int32 (-1,)"),
                (["int32", [1.5], 96], "array x is int32 (1.5,)"),
                (["int32", [True], 96], "array x is int32 (True,)"),
                (["int32", [1] * 5, 96], "at most 4 sizes"),
                (["int32", [1], -8], "at -8"),
                (["int32", [1], "a"], "at a"),
                (["int32", [2**62, 4], 96], "array x lies at bytes 96 to"),
                (["int32", [1], 8], "array x lies at bytes 8 to 12"),
                (["int32", [1], 97], "multiples of 8"),
                (["int32", [999], 96], "array x lies at bytes 96 to 4092 of a frame of"),
            )
        ),
        (with_header(json.dumps({"fields": {}, "arrays": {"x": ["uint8", [8], 120], "y": ["uint8", [9], 112]}})), "array x"),
    ],
)  # fmt: skip
def test_what_is_no_frame_is_named(data, said):
    with pytest.raises(FrameError) as error:
        frame.decode(data)
    assert said in str(error.value) and len(str(error.value)) < 300


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, len(GOOD) - 1))
def test_damage_is_an_error_or_another_frame(noise, place):
    data = GOOD[:place] + noise + GOOD[place + len(noise) :]
    try:
        frame.decode(data)
    except FrameError:
        pass


@pytest.mark.parametrize("tau", [math.inf, 1.25])
def test_requests_and_trees_are_equal_after_a_round_trip(tau):
    sent = [dataclasses.replace(fake.request(seed, patches=4 * seed), tau_high=tau, stop=("a",)) for seed in range(1, 4)]
    for got, wanted in zip(unframe_requests(frame_requests(sent)), sent, strict=True):
        for name, value in vars(wanted).items():
            np.testing.assert_array_equal(getattr(got, name), value)
    tree = fake.group(sent[0])
    index, got = unframe_tree(*frame.decode(frame_tree(5, tree)))
    assert index == 5
    for name, value in vars(tree).items():
        np.testing.assert_array_equal(getattr(got, name), value)


def changed(**fields):
    parts = frame.decode(frame_requests([fake.request(1, patches=4)]))
    group = {**parts.fields["groups"][0], **fields}
    return frame.encode({"groups": [{k: v for k, v in group.items() if v != "left out"}]}, parts.arrays)


@pytest.mark.parametrize(
    "body, status, said",
    [
        (GOOD[:20], 422, "20 bytes are no frame"),
        (GOOD[:8] + struct.pack("<I", 2) + GOOD[12:], 422, "a frame of version 2, this release reads 1"),
        (GOOD[:16] + struct.pack("<Q", 10 * 2**30) + GOOD[24:], 422, "a frame of 10737418240 bytes"),
        (frame_requests([fake.request(1)])[:-8], 422, "the limit is"),
        (frame.encode({}, {}), 422, "1 to 4096 groups"),
        (changed(seed="left out"), 422, "groups.0.seed: Field required"),
        (changed(temperature=-1), 422, "groups.0.temperature: "),
        (changed(other=1), 422, "groups.0.other: Extra inputs"),
        (frame.encode({"groups": [frame.decode(changed()).fields["groups"][0]]}, {}), 422, "groups.0.token_ids: no array"),
    ],
)  # fmt: skip
def test_a_bad_frame_is_refused_in_a_line_and_the_service_goes_on(body, status, said):
    with fake.serving(fake.FakeEngine()) as url:
        answer = httpx.post(f"{url}/v1/rollouts", content=body, headers={"Content-Type": MEDIA_TYPE})
        assert answer.status_code == status and said in answer.json()["detail"] and len(answer.content) < 500
        good = httpx.post(f"{url}/v1/rollouts", content=changed(), headers={"Content-Type": MEDIA_TYPE})
        assert good.headers["content-type"] == MEDIA_TYPE
        ((fields, arrays),) = FrameStream(2**30).feed(good.content)
        assert unframe_tree(fields, arrays)[1].problem_id == "p1"


def with_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 3, 1, 196), np.uint8)
    patches = pixel_patches([pixels[:4], pixels[4:]], rng.random((3, 256), np.float32), 1176)
    return dataclasses.replace(fake.request(1, patches=8), patches=patches, grid_thw=np.array([[1, 2, 2]] * 2, np.int32))


def test_images_travel_as_pixels():
    sent = with_pixels()
    (got,) = unframe_requests(frame_requests([sent]))
    np.testing.assert_array_equal(np.asarray(got.patches), np.asarray(sent.patches))
    assert len(frame_requests([sent])) < 8 * 588 + 5000  # a byte a pixel, the table, token ids


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f, a: f["pixels"].update(cuts=[[4, 1]]), "groups.0.pixels: "),
        (lambda f, a: f["pixels"].update(cuts=[[4, 3], [4, 1]]), "groups.0.pixels.cuts.0.1"),
        (lambda f, a: f["pixels"].update(cuts=[[2**23, 2]] * 4096), "groups.0.pixels: "),
        (lambda f, a: f["pixels"].update(values=8), "groups.0.pixels.values"),
        (lambda f, a: a.pop("0/pixels"), "the frame needs arrays `pixels`"),
        (lambda f, a: a.update({"0/table": a["0/table"][:2]}), "the frame needs arrays `pixels`"),
        (lambda f, a: a.update({"0/grid_thw": a["0/grid_thw"][:1]}), "groups.0.grid_thw counts other than the 8 patches"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(change, said):
    fields, arrays = frame.decode(frame_requests([with_pixels()]))
    change(fields["groups"][0], arrays)
    with pytest.raises(ValueError) as error:
        unframe_requests(frame.encode(fields, arrays))
    assert said in str(error.value)
