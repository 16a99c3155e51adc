"""Run lengths: the same as COCO's, and safe where COCO's own decoder is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from hrsam.rle import decode, encode


def masks():
    rng = np.random.default_rng(0)
    for case in range(120):
        height, width = rng.integers(1, 50, 2)
        yield rng.random((height, width)) < (0.0, 1.0, 0.5, 0.03, 0.97)[case % 5]
    rows, columns = np.ogrid[:700, :900]
    yield (rows - 300) ** 2 + (columns - 400) ** 2 < 250**2
    yield np.ones((1500, 2000), bool)  # one long run: several groups of bits
    yield (rows % 400 < 390) & (columns < 800)  # differences of both signs


def test_both_directions_equal_coco():
    for mask in masks():
        ours = encode(mask)
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
        for rle in (ours, theirs):
            decoded = decode(rle)
            assert decoded.dtype == bool
            assert decoded.flags.c_contiguous
            np.testing.assert_array_equal(decoded, mask)


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_round_trip(mask):
    np.testing.assert_array_equal(decode(encode(mask)), mask)
    np.testing.assert_array_equal(decode(encode(mask.T))[...].T, mask)  # a view in the other memory order


def test_uncompressed_counts():
    expected = np.array([[False, True, True], [False, True, False]])  # columns: 00 11 10
    np.testing.assert_array_equal(decode({"size": [2, 3], "counts": [2, 3, 1]}), expected)
    np.testing.assert_array_equal(decode({"size": (2, 3), "counts": (1, 0, 1, 3, 1)}), expected)  # an empty run
    assert encode(expected)["counts"] == "231"


@given(st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=12), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_string_is_decoded_or_refused(text, height, width):
    try:
        mask = decode({"size": [height, width], "counts": text})
    except ValueError:
        return
    assert mask.shape == (height, width)


@pytest.mark.parametrize(
    ("rle", "words"),
    [
        ("231", "mapping with the keys"),
        ({"counts": "231"}, "mapping with the keys"),
        ({"size": [2, 3]}, "mapping with the keys"),
        ({"size": 6, "counts": "231"}, "give \\[height, width\\]"),
        ({"size": [2, 3, 1], "counts": "231"}, "give \\[height, width\\]"),
        ({"size": [2.0, 3.0], "counts": "231"}, "whole numbers"),
        ({"size": [True, 6], "counts": "231"}, "whole numbers"),
        ({"size": [0, 3], "counts": []}, "at least 1"),
        ({"size": [-2, -3], "counts": "231"}, "at least 1"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "the limit is"),
        ({"size": [2, 3], "counts": "23"}, "add up to 5, but 2x3 pixels need 6"),  # COCO returns uninitialised memory
        ({"size": [2, 3], "counts": "2311"}, "add up to 10"),
        ({"size": [2, 3], "counts": "232"}, "add up to 7"),
        ({"size": [2, 3], "counts": ""}, "add up to 0"),
        ({"size": [2, 3], "counts": []}, "add up to 0"),
        ({"size": [2, 3], "counts": [2, -3, 7]}, "longer than"),
        ({"size": [2, 3], "counts": [2, -1, 5]}, "from 0 to 6, got -1"),
        ({"size": [2, 3], "counts": [2**70]}, "longer than"),
        ({"size": [2, 3], "counts": [2, 3.0, 1]}, "list of integers"),
        ({"size": [2, 3], "counts": [2, "3", 1]}, "list of integers"),
        ({"size": [2, 3], "counts": [[2, 3, 1]]}, "list of integers"),
        ({"size": [2, 3], "counts": None}, "got RLE counts as NoneType"),
        ({"size": [2, 3], "counts": "2~1"}, "characters outside"),
        ({"size": [2, 3], "counts": b"2\x001"}, "characters outside"),
        ({"size": [2, 3], "counts": "2é1"}, "characters outside"),
        ({"size": [2, 3], "counts": "23Q"}, "cut off"),
        ({"size": [2, 3], "counts": "PPPPPPPPPPPPPPPP1"}, "35 bits"),
        ({"size": [2, 3], "counts": "PPPPPP?"}, "from 0 to 6"),
    ],
)
def test_hostile_input_is_refused(rle, words):
    with pytest.raises(ValueError, match=words):
        decode(rle)


def test_limit_is_an_argument():
    rle = encode(np.ones((3, 5), bool))
    assert decode(rle, max_pixels=15).all()
    with pytest.raises(ValueError, match="3x5 pixels, the limit is 14; raise max_pixels"):
        decode(rle, max_pixels=14)


def test_encode_refuses_what_is_no_mask():
    for bad in (np.ones((2, 2), np.uint8), np.ones((2, 2, 1), bool), np.ones((0, 2), bool)):
        with pytest.raises(ValueError, match=r"give \(H, W\) bool"):
            encode(bad)
