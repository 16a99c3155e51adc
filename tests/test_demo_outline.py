"""Masks as the server sends them: the outline's code holds every pixel, and no answer is large."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrsam.clicks import Click
from hrsam.cutting import MAX_ROUNDS, Thing
from hrsam.demo import messages, outline
from hrsam.demo.limits import LIMITS
from hrsam.frame import Frame
from hrsam.mask import Mask
from hrsam.session import History, Prediction, Round

MOST = 50_000  # bytes of an answer


def there_and_back(mask):
    box = mask.bbox
    code = outline.encode(outline.runs_of(mask, box))
    return outline.decode(code, box[3] - box[1], box[2] - box[0])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.98), st.integers(0, 2**32 - 1))
def test_a_code_holds_every_pixel(height, width, share, seed):
    mask = Mask.of(np.random.default_rng(seed).random((height, width)) < share)
    if mask.bbox is not None:
        np.testing.assert_array_equal(there_and_back(mask), mask.window(*mask.bbox))


def test_whatever_two_columns_are_side_by_side():
    """All that can begin, end, join and part between one column and the next."""
    columns = (np.arange(64)[:, None] >> np.arange(6) & 1).astype(bool)
    for column in columns[1:]:
        pairs = np.stack([np.broadcast_to(column, columns.shape), columns], axis=1).reshape(-1, 6).T
        mask = Mask.of(pairs)
        np.testing.assert_array_equal(there_and_back(mask), mask.window(*mask.bbox))


def test_an_outline_that_jumps_far_is_told_too():
    pixels = np.zeros((30_000, 5), bool)
    for x, y in enumerate((29_000, 3, 20_000, 20_100, 7)):
        pixels[y : y + 900, x] = True
    pixels[:, 4] = True
    mask = Mask.of(pixels)
    np.testing.assert_array_equal(there_and_back(mask), mask.window(*mask.bbox))


def test_run_lengths_with_gaps_of_no_pixel_are_one_run():
    mask = Mask.from_rle({"size": [4, 3], "counts": [1, 2, 0, 3, 0, 1, 5]})
    runs = outline.runs_of(mask, mask.bbox)
    assert runs.column.tolist() == [0, 1]
    np.testing.assert_array_equal(there_and_back(mask), mask.window(*mask.bbox))


def thing(mask, clicks=0):
    """An object with that mask and so many clicks."""
    frame = Frame(mask.height, mask.width, 1024)
    prompt = tuple(Click(x + 1234.5678901234, 4095.123456789012, False) for x in range(clicks))
    low_res = frame.mask_to_logits(mask.sample(2048), 8.0)
    history = History((Round(prompt, None, Prediction(frame, low_res, 0.5, 0), mask),))
    return Thing(1, "n" * 100, "#1e90ff", frame, history)


def answer(thing):
    """The mask's header, its samples, and the bytes of the answer to a click."""
    where, code = messages.draw(thing, 1, LIMITS.mask_side, LIMITS.mask_bytes)
    ms = dict.fromkeys(("queue", "encode", "decode", "mask"), 12345.6)
    numbers = {"seq": messages.MOST, "revision": messages.MOST, "ms": ms}
    head = {**numbers, "object": messages.describe(thing, 1), "mask": where}
    return where, outline.decode(code, where["height"], where["width"]), len(messages.pack(head, code))


def ragged(side, cells, seed=0):
    """(side, side) bool: random logits of ``cells`` x ``cells``, enlarged as the model's are: rags of all forms."""
    frame = Frame(side, side, 4 * cells)
    import torch

    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=frame.logits_size).astype(np.float32))
    return Mask.of(frame.mask_to_original(noise))


def test_a_ragged_mask_is_sent_to_the_pixel_and_is_small():
    mask = ragged(4096, 64)
    where, samples, size = answer(thing(mask))
    assert where["step"] == 1
    assert size <= MOST
    assert len(messages.png(mask.window(*mask.bbox))) > 1.8 * size  # what it was before
    np.testing.assert_array_equal(samples, mask.window(*mask.bbox))


@pytest.mark.parametrize("cells", [256, 1024, 4096])
def test_no_answer_is_large_whatever_the_mask(cells):
    mask = ragged(4096, cells) if cells < 4096 else Mask.of(np.random.default_rng(0).random((4096, 4096)) < 0.5)
    where, samples, size = answer(thing(mask, MAX_ROUNDS))
    assert where["step"] > 1
    assert size <= MOST
    step, (_, _, x1, y1) = where["step"], mask.bbox
    assert where["x"] % step == where["y"] % step == 0
    np.testing.assert_array_equal(samples, mask.window(where["x"], where["y"], x1, y1, step))


def test_what_lies_between_the_samples_is_still_told_to_be_there():
    pixels = np.zeros((4096, 4096), bool)
    pixels[1::2, 1::2] = True
    pixels[0, 0] = True  # samples begin at whole steps
    where, samples, _ = answer(thing(Mask.of(pixels)))
    assert (where["x"], where["y"]) == (0, 0)
    assert where["width"] * where["step"] >= 4096
    assert samples.sum() == 1
