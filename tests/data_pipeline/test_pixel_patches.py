"""Pixels kept as bytes and cut on demand: what the image processor itself gives, to the bit."""

import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import Segment, pack
from data_pipeline.pixels import Cut, PixelPatches, pixel_patches, value_table
from data_pipeline.tokenizer import make_image_processor
from data_pipeline.videos import RAW, video_pixels

PROCESSOR = make_image_processor(28 * 28, 28 * 28 * 12)
TABLE = value_table(PROCESSOR)


def stills(images):
    """Returns pixels of patches of each image, and the patches and grids that the processor gives."""
    pixels, patches, grids = [], [], []
    for image in images:
        raw = PROCESSOR([image], return_tensors="np", input_data_format="channels_last", **RAW)["pixel_values"]
        pixels.append(raw.reshape(len(raw), 3, 2, -1)[:, :, :1].astype(np.uint8))
        theirs = PROCESSOR([image], return_tensors="np", input_data_format="channels_last")
        patches.append(theirs["pixel_values"])
        grids.append(theirs["image_grid_thw"][0].tolist())
    return pixels, patches, grids


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(9, 120), st.integers(9, 120), st.integers(0, 2**31)), min_size=1, max_size=3))
def test_patches_are_the_processors_to_the_bit_and_an_image_is_found_again(sizes):
    images = [np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8) for h, w, seed in sizes]
    pixels, patches, grids = stills(images)
    mine = pixel_patches(pixels, TABLE, 1176)
    assert mine.shape == (sum(map(len, patches)), 1176) and len(mine) == mine.shape[0]
    for one in (mine, pickle.loads(pickle.dumps(mine))):
        np.testing.assert_array_equal(np.asarray(one), np.concatenate(patches))
    np.testing.assert_array_equal(mine[1:3], np.concatenate(patches)[1:3])
    for index, (image, (_, rows, columns)) in enumerate(zip(images, grids, strict=True)):
        found = mine.image(index, rows, columns)
        assert found.shape == (14 * rows, 14 * columns, 3)
        if found.shape == image.shape:  # it was not scaled
            np.testing.assert_array_equal(found, image)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_a_video_shows_two_frames_in_a_patch(count, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, 56, 84, 3), np.uint8)
    pixels, grid = video_pixels(PROCESSOR, frames)
    mine = np.asarray(pixel_patches([pixels], TABLE, 1176)).reshape(-1, 3, 2, 196)
    assert grid.tolist() == [[-(-count // 2), 4, 6]]
    whole = [*frames, *[frames[-1]] * (count % 2)]
    for pair in range(len(whole) // 2):
        for place in range(2):
            _, (theirs,), _ = stills([whole[2 * pair + place]])
            here = slice(24 * pair, 24 * pair + 24)
            np.testing.assert_array_equal(mine[here, :, place], theirs.reshape(-1, 3, 2, 196)[:, :, 0])


def test_pixels_are_held_compressed_where_that_is_smaller():
    flat, noise = np.zeros((280, 280, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (84, 84, 3), np.uint8)
    (plain,), _, _ = stills([flat])
    (rough,), _, _ = stills([noise])
    assert pixel_patches([plain], TABLE, 1176).nbytes < plain.size / 100
    assert pixel_patches([rough], TABLE, 1176).nbytes == rough.size


def patches_of(data, count=4):
    return PixelPatches(data, [Cut(count, 1)], TABLE, 1176)


@pytest.mark.parametrize(
    "data, said",
    [
        (bytes(10), "send 2352 bytes, or the same compressed by zlib"),
        (zlib.compress(bytes(2351)), "pixels: 2351 bytes or more; send 2352"),
        (zlib.compress(bytes(2**30), 9), "pixels: 2353 bytes or more; send 2352"),  # a bomb is not blown up
        (zlib.compress(bytes(2352))[:-9], "pixels: "),
    ],
    ids=("short", "one less", "a bomb", "cut short"),
)
def test_bytes_that_are_not_the_patches_are_refused(data, said):
    np.testing.assert_array_equal(np.asarray(patches_of(zlib.compress(bytes(2352))))[0, :196], TABLE[0, 0])
    with pytest.raises(ValueError, match=said):
        patches_of(data).raw()


def test_micro_batches_have_the_patches_of_one_at_a_time():
    (one,), (theirs,), (grid,) = stills([np.random.default_rng(1).integers(0, 256, (28, 84, 3), np.uint8)])
    patches = pixel_patches([one], TABLE, 1176)
    tokens = np.zeros(5, np.int32)
    segment = Segment(tokens, np.zeros((3, 5), np.int32), patches, np.array([grid], np.int32))
    batches = pack([segment] * 3, rows=1, row_tokens=12, row_patches=24)
    assert len(batches) == 2 and batches[0]["patches"].shape == (1, 24, 1176)
    np.testing.assert_array_equal(batches[0]["patches"][0], np.concatenate([theirs, theirs]))
    np.testing.assert_array_equal(batches[-1]["patches"][0, :12], theirs)
    assert not batches[-1]["patches"][0, 12:].any() and batches[0]["patches"] is not batches[0]["patches"]
