"""Geometry: half a pixel matters."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from hrsam import frame as frame_module
from hrsam.frame import Frame

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RNG = np.random.default_rng(0)

FRAMES = [
    Frame(100, 333, 256),
    Frame(333, 100, 256, square=False),
    Frame(70, 50, 512),
    Frame(1, 1, 64),
    Frame(1, 5000, 256),
    Frame(5000, 3, 256, square=False),
    Frame(300, 451, 150),
]


@pytest.mark.parametrize(
    ("frame", "resized", "padded"),
    [
        (Frame(768, 1024, 1024), (768, 1024), (1024, 1024)),
        (Frame(1024, 768, 1024, square=False), (1024, 768), (1024, 768)),
        (Frame(3000, 2001, 1024), (1024, 683), (1024, 1024)),
        (Frame(3000, 2001, 1024, square=False), (1024, 683), (1024, 688)),
        (Frame(300, 451, 150), (100, 150), (160, 160)),
        (Frame(300, 451, 150, square=False), (100, 150), (112, 160)),
        (Frame(1, 1, 1024), (1024, 1024), (1024, 1024)),
        (Frame(1, 5000, 1024), (1, 1024), (1024, 1024)),
        (Frame(5000, 1, 1024, square=False), (1024, 1), (1024, 16)),
    ],
)
def test_sizes(frame, resized, padded):
    assert frame.resized == resized
    assert frame.padded == padded
    assert frame.logits_size == (padded[0] // 4, padded[1] // 4)


@pytest.mark.parametrize("frame", FRAMES)
def test_points_go_and_come_back(frame):
    points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor([frame.width, frame.height]) - 0.5
    torch.testing.assert_close(frame.to_original(frame.to_model(points)), points, rtol=0, atol=1e-9)
    height, width = frame.resized
    corners = torch.tensor([[-0.5, -0.5], [frame.width - 0.5, frame.height - 0.5]])  # the outer edges of the picture
    expected = torch.tensor([[-0.5, -0.5], [width - 0.5, height - 0.5]])
    torch.testing.assert_close(frame.to_model(corners), expected, rtol=0, atol=1e-3)


def test_points_by_hand():
    half = Frame(400, 800, 400)
    points = torch.tensor([[0, 0], [1, 3], [799, 399]])
    assert half.to_model(points).tolist() == [[-0.25, -0.25], [0.25, 1.25], [399.25, 199.25]]
    assert half.to_model(points.double()).dtype == torch.float64
    assert half.to_model(torch.empty(0, 2)).shape == (0, 2)
    same = Frame(37, 64, 64)
    assert same.to_model(points).tolist() == points.tolist()


@pytest.mark.parametrize("frame", FRAMES)
def test_a_bright_dot_is_where_its_click_goes(frame):
    """The pictures and the clicks follow the same geometry: brightness has its centre of mass at the mapped point."""
    pixels = np.zeros((frame.height, frame.width, 3), np.uint8)
    x, y = frame.width // 3, frame.height // 2
    spread = slice(max(0, y - 20), y + 21), slice(max(0, x - 20), x + 21)
    pixels[spread] = 255
    rows, columns = np.nonzero(pixels[..., 0])
    mass = frame.prepare(pixels, (0, 0, 0), (1, 1, 1))[0].double()
    along_x = (mass.sum(0) * torch.arange(mass.shape[1])).sum() / mass.sum()
    along_y = (mass.sum(1) * torch.arange(mass.shape[0])).sum() / mass.sum()
    centre = frame.to_model(torch.tensor([[columns.mean(), rows.mean()]]))[0]
    assert abs(along_x - centre[0]) < 0.05
    assert abs(along_y - centre[1]) < 0.05


def test_prepare_normalises_then_pads():
    frame = Frame(48, 64, 64)
    pixels = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    ready = frame.prepare(pixels, MEAN, STD)
    assert ready.shape == (3, 64, 64)
    assert ready.dtype == torch.float32
    expected = ((pixels.astype(np.float64) - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(ready[:, :48], expected, atol=1e-6)
    assert not ready[:, 48:].any()
    swapped = ((pixels[..., ::-1].astype(np.float64) - MEAN) / STD).transpose(2, 0, 1)  # blue with red's statistics
    np.testing.assert_allclose(frame.prepare(pixels, MEAN, STD, bgr=True)[:, :48], swapped, atol=1e-6)


def test_prepare_averages_areas_and_accepts_any_view():
    pixels = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(200)  # a chequerboard: aliasing would show
    pixels = np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2)
    small = Frame(64, 64, 16).prepare(pixels, (0, 0, 0), (1, 1, 1))
    assert (small == 100).all()
    view = RNG.integers(0, 256, (50, 40, 3), dtype=np.uint8)[::-1, ::-1]
    view.flags.writeable = False
    frame = Frame(50, 40, 32)
    torch.testing.assert_close(frame.prepare(view, MEAN, STD), frame.prepare(view.copy(), MEAN, STD), rtol=0, atol=0)


@pytest.mark.parametrize("frame", FRAMES)
def test_logits_equal_the_definition(frame, monkeypatch):
    """Against torch's own bilinear in float64; bands of a few rows."""
    monkeypatch.setattr(frame_module, "_BAND", 7 * frame.width)
    logits = torch.from_numpy(RNG.standard_normal(frame.logits_size, dtype=np.float32))
    height, width = frame.resized
    large = interpolate(logits.double()[None, None], frame.padded, mode="bilinear")[..., :height, :width]
    expected = interpolate(large, (frame.height, frame.width), mode="bilinear")[0, 0].float()
    enlarged = frame.logits_to_original(logits)
    torch.testing.assert_close(enlarged, expected, rtol=0, atol=2e-5)
    mask = frame.mask_to_original(logits)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, enlarged.numpy() > 0)


@pytest.mark.parametrize("frame", [*FRAMES, Frame(700, 900, 1024), Frame(64, 64, 64)])
def test_rows_are_the_same_to_the_bit_whatever_else_is_asked_for(frame, monkeypatch):
    logits = torch.from_numpy(RNG.standard_normal(frame.logits_size, dtype=np.float32))
    whole = frame.logits_to_original(logits).numpy()
    last = frame.height
    wanted = [
        range(last),
        range(last // 3, last // 3 + 1),
        range(last // 2, last),
        range(0, last, 7),
        range(last - 1, last),
    ]
    for band in (1 << 22, 3 * frame.width):
        monkeypatch.setattr(frame_module, "_BAND", band)
        for rows in wanted:
            got = np.empty((len(rows), frame.width), np.float32)
            for some, part in frame.bands(logits, rows):
                got[some] = part
            np.testing.assert_array_equal(got, whole[rows])
    assert list(frame.bands(logits, range(0))) == []


@pytest.mark.parametrize("frame", FRAMES)
def test_rows_above_hold_all_of_the_mask(frame):
    for top, bottom in ((0, 1), (1, 2), (0, frame.logits_size[0])):
        logits = torch.full(frame.logits_size, -1e-3)
        logits[top:bottom, ::3] = 1e6
        rows = frame.rows_above(logits)
        mask = frame.mask_to_original(logits)
        assert mask.any() or frame.height == 1
        assert not mask[: rows.start].any()
        assert not mask[rows.stop :].any()
    assert len(frame.rows_above(torch.zeros(frame.logits_size))) == 0


def test_rows_above_are_few_for_a_low_object():
    logits = torch.full((256, 256), -1.0)
    logits[128] = 1
    rows = Frame(30_000, 30_000, 1024).rows_above(logits)
    assert rows.start > 14_000
    assert len(rows) < 400


def test_a_picture_that_was_resized_already_is_taken_as_it_is():
    frame = Frame(97, 131, 60)
    pixels = RNG.integers(0, 256, (97, 131, 3), dtype=np.uint8)
    height, width = frame.resized
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    assert torch.equal(frame.prepare(small, MEAN, STD), frame.prepare(pixels, MEAN, STD))


def test_half_precision_logits_with_gradient():
    frame = Frame(30, 20, 32)
    logits = torch.randn(frame.logits_size, dtype=torch.float16, requires_grad=True)
    torch.testing.assert_close(frame.logits_to_original(logits), frame.logits_to_original(logits.detach().float()))


@pytest.mark.parametrize("side", [256, 1000, 1024, 2048])
@pytest.mark.parametrize(("height", "width", "edge"), [(333, 517, 200.3), (517, 333, 77.7), (90, 61, 20.2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_lands_within_half_a_pixel(side, height, width, edge, axis):
    """A logit plane x − x₀ in the model's frame gives a mask that begins at x₀ in the original."""
    frame = Frame(height, width, side)
    there = frame.to_model(torch.tensor([[edge, edge]], dtype=torch.float64))[0, axis]
    plane = (torch.arange(frame.logits_size[1 - axis]) + 0.5) * 4 - 0.5 - there
    plane = plane if axis == 0 else plane[:, None]
    mask = frame.mask_to_original(plane.float().expand(frame.logits_size))
    line = mask[height // 2] if axis == 0 else mask[:, width // 2]
    first = int(line.argmax())
    assert abs(first - 0.5 - edge) <= 0.5
    assert line[first:].all()


@pytest.mark.parametrize("frame", [Frame(400, 300, 256), Frame(60, 80, 512, square=False), Frame(1, 1, 16)])
def test_a_given_mask_survives_the_way_in_and_out(frame):
    y, x = np.ogrid[: frame.height, : frame.width]
    mask = (x - frame.width / 2) ** 2 + (y - frame.height / 2) ** 2 <= (min(frame.height, frame.width) / 3) ** 2 + 1
    logits = frame.mask_to_logits(mask, 8.0)
    assert logits.shape == frame.logits_size
    assert logits.dtype == torch.float32
    assert logits.max() == 8
    back = frame.mask_to_original(logits)
    assert (back & mask).sum() / (back | mask).sum() > 0.97
    height, width = (-(-n // 4) for n in frame.resized)
    assert (logits[height:] == -8).all()
    assert (logits[:, width:] == -8).all()


def test_mask_logits_are_covered_shares():
    mask = np.zeros((64, 64), bool)
    mask[:, :6] = True  # a cell and a half
    logits = Frame(64, 64, 64).mask_to_logits(mask, 10.0)
    assert logits[3].tolist() == [10.0, 0.0] + [-10.0] * 14
    mask[:, :6] = False
    mask[:8, :4] = True
    assert Frame(64, 64, 32).mask_to_logits(mask, 10.0)[:2, :2].tolist() == [[0.0, -10.0], [-10.0, -10.0]]


def test_a_thinned_mask_gives_nearly_the_same_logits():
    frame = Frame(400, 301, 64)
    y, x = np.ogrid[:400, :301]
    mask = (x - 150) ** 2 + (y - 200) ** 2 < 120**2
    whole, thin = frame.mask_to_logits(mask, 8.0), frame.mask_to_logits(mask[::3, ::3], 8.0)
    assert (whole - thin).abs().max() < 4
    assert (whole - thin).abs().mean() < 0.2
    with pytest.raises(ValueError, match="this frame needs bool"):
        frame.mask_to_logits(mask[::3, ::2], 8.0)


@pytest.mark.parametrize("frame", [Frame(400, 300, 256), Frame(60, 80, 512), Frame(250, 250, 250)])
def test_logits_survive_the_way_in_and_out(frame):
    y, x = np.mgrid[: frame.height, : frame.width].astype(np.float32)
    logits = (np.hypot(x - frame.width / 2, y - frame.height / 3) - 25) / 10
    there = frame.logits_to_model(logits)
    assert (there.shape, there.dtype) == (frame.logits_size, torch.float32)
    back = frame.logits_to_original(there).numpy()
    assert np.abs(back - logits)[4:-4, 4:-4].mean() < 0.01  # a shift by half a cell would be 0.2
    height, width = (-(-n // 4) for n in frame.resized)
    assert (there[height:] == -10).all()
    assert (there[:, width:] == -10).all()
    for bad in (logits.T if frame.height != frame.width else logits[1:], logits.astype(np.float64)):
        with pytest.raises(ValueError, match="give float32"):
            frame.logits_to_model(bad)


def test_shrinking_is_opencv_area():
    frame = Frame(97, 131, 60)
    pixels = RNG.integers(0, 256, (97, 131, 3), dtype=np.uint8)
    height, width = frame.resized
    expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    ready = frame.prepare(pixels, (0, 0, 0), (1, 1, 1))[:, :height, :width].permute(1, 2, 0)
    np.testing.assert_array_equal(ready.numpy(), expected)


def test_refusals():
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="needs at least one"):
            Frame(*size, 64)
    with pytest.raises(ValueError, match="side=15; the model's input needs at least 16"):
        Frame(5, 5, 15)
    frame = Frame(40, 64, 64)
    good = np.zeros((40, 64, 3), np.uint8)
    for bad in (good.transpose(1, 0, 2), good.astype(np.float32), good[..., 0]):
        with pytest.raises(ValueError, match=r"this frame is for uint8 \(40, 64, 3\)"):
            frame.prepare(bad, MEAN, STD)
    with pytest.raises(ValueError, match=r"this frame needs \(16, 16\)"):
        frame.mask_to_original(torch.zeros(10, 16))
    for bad in (good[..., 0], good[..., 0].T > 0):
        with pytest.raises(ValueError, match=r"this frame needs bool \(40, 64\)"):
            frame.mask_to_logits(bad, 8.0)
    with pytest.raises(ValueError, match=r"give \(n, 2\)"):
        frame.to_model(torch.zeros(2))
