"""Clicks, the exact distance, and the simulated user against brute force."""

import random

import cv2
import numpy as np
import pytest
import torch

from hrsam.clicks import (
    Click,
    Draws,
    _deepest,
    _settle,
    check_clicks,
    next_click,
    parse_click,
    random_clicks,
    simulate_clicks,
)
from hrsam.kernels import has_triton
from hrsam.ops.distance import squared_distance


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(height, width, seed, smooth=2):
    noise = torch.randn(1, 1, height + 2 * smooth, width + 2 * smooth, generator=generator(seed))
    return torch.nn.functional.avg_pool2d(noise, 2 * smooth + 1, stride=1)[0, 0].numpy() > 0


def block(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def brute_squared(region):
    """(H, W) bool -> integers: for each True pixel all False pixels of picture and frame are tried."""
    outside = np.argwhere(~np.pad(region, 1)) - 1
    squared = np.zeros(region.shape, dtype=int)
    for row, col in np.argwhere(region):
        squared[row, col] = ((outside - (row, col)) ** 2).sum(1).min()
    return squared


def test_distance_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    expected = [[1, 1, 1, 1, 1], [1, 4, 4, 2, 1], [1, 4, 4, 1, 0], [1, 4, 4, 2, 1], [1, 1, 1, 1, 1]]
    for impl in ("naive", "torch"):
        assert squared_distance(mask, impl=impl).tolist() == expected


FAST = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="needs Triton"))]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("share", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2, 13, 9), (2, 21, 32)])
def test_distance_equals_definition(shape, share, impl):
    mask = torch.rand(shape, generator=generator()) < share
    squared = squared_distance(mask, impl=impl)
    assert squared.dtype == torch.int32
    assert torch.equal(squared, squared_distance(mask, impl="naive"))


@pytest.mark.parametrize("impl", FAST)
def test_distance_over_several_tiles_and_views(impl):
    """Tiles of the kernel's second pass are 4 x 128; a transposed mask is not contiguous."""
    mask = torch.rand(140, 11, generator=generator()).lt(0.995).t()
    assert torch.equal(squared_distance(mask, impl=impl), squared_distance(mask, impl="naive"))
    assert squared_distance(torch.ones(0, 3, 4, dtype=torch.bool), impl=impl).shape == (0, 3, 4)


@pytest.mark.gpu
def test_distance_on_gpu():
    for shape, share in (((2, 257, 311), 0.9999), ((1, 2048, 2048), 0.99999), ((1, 1500, 2188), 1.0)):
        mask = (torch.rand(shape, generator=generator()) < share).cuda()
        squared = squared_distance(mask, impl="triton")
        assert torch.equal(squared, squared_distance(mask, impl="torch"))


@pytest.mark.parametrize("band", [1, 40, 130])
def test_distance_in_bands(monkeypatch, band):
    monkeypatch.setattr("hrsam.ops.distance.BAND_CPU", band)
    mask = torch.rand(2, 7, 11, generator=generator()) < 0.9
    assert torch.equal(squared_distance(mask, impl="torch"), squared_distance(mask, impl="naive"))


def test_distance_refuses():
    with pytest.raises(ValueError, match=r"must be bool .*float32"):
        squared_distance(torch.ones(3, 3))
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        squared_distance(torch.ones(3, 3).bool(), impl="cuda")


def test_click_holds_plain_values():
    click = Click(np.float32(3.5), np.int64(2), np.bool_(False))
    assert click == Click(3.5, 2.0, False)
    assert (type(click.x), type(click.y), type(click.positive)) == (float, float, bool)
    assert Click(1, 2).positive is True
    assert Click(1, 2, 0).positive is False


@pytest.mark.parametrize("x", [float("nan"), float("inf"), "3", None, True])
def test_click_refuses_coordinates(x):
    with pytest.raises(ValueError, match="finite number"):
        Click(x, 0)
    with pytest.raises(ValueError, match="a click's y"):
        Click(0, x)


@pytest.mark.parametrize("label", [2, -1, 0.5, "1", None, float("nan")])
def test_click_refuses_labels(label):
    with pytest.raises(ValueError, match="label must be 1"):
        Click(0, 0, label)


def test_parse_click():
    assert parse_click("812,1440") == Click(812, 1440, True)
    assert parse_click(" 8.5, 14 ,0") == Click(8.5, 14, False)
    for text in ("", "3", "3,4,5", "3,4,1,1", "a,4", "3,nan", "3,,1", "3,4,"):
        with pytest.raises(ValueError, match="a click is X,Y"):
            parse_click(text)


def test_check_clicks_at_the_borders():
    check_clicks([Click(0, 0), Click(9, 4), Click(-0.5, -0.5), Click(9.499, 4.499)], height=5, width=10)
    for outside in (Click(-0.51, 0), Click(0, -0.51), Click(9.5, 0), Click(0, 4.5)):
        with pytest.raises(ValueError, match=r"click 1 at .* outside the picture of 10 x 5"):
            check_clicks([Click(0, 0), outside], height=5, width=10)


@pytest.mark.parametrize("seed", range(8))
def test_deepest_equals_brute_force(seed):
    """Sparse holes, noise and blobs; both ways through the function (few shallow pixels, or not)."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 33, 2)
    for region in (rng.random(shape) < 0.5, rng.random(shape) < 0.99, blobs(*shape, seed), np.ones(shape, dtype=bool)):
        squared = brute_squared(region)
        depth, pixels = _deepest(region, [])
        assert depth == squared.max()
        assert pixels.tolist() == (np.argwhere(squared == depth).tolist() if depth else [])
        skip = [tuple(pixel) for pixel in pixels[:3]]
        for pixel in skip:
            squared[pixel] = 0
        depth, pixels = _deepest(region, skip)
        assert depth == squared.max()
        assert pixels.tolist() == (np.argwhere(squared == depth).tolist() if depth else [])


def test_deepest_beyond_float32(monkeypatch):
    """So wide and deep that float32 may miss squared distances by one; here it does so all the time."""
    exact = cv2.distanceTransform

    def blurred(region, kind, mask_size):
        distance = exact(region, kind, mask_size)
        if mask_size != cv2.DIST_MASK_PRECISE:
            return distance
        error = np.random.default_rng(0).integers(-1, 2, distance.shape) * (distance > 0)
        return np.sqrt(distance**2 + error).astype(np.float32)

    monkeypatch.setattr(cv2, "distanceTransform", blurred)
    region = np.ones((1201, 2600), dtype=bool)
    region[600, 1300] = False
    depth, pixels = _deepest(region, [])
    assert depth == 601**2  # on the middle line, if not nearer to the hole or the ends
    assert pixels.tolist() == [[600, col] for col in range(600, 2000) if abs(col - 1300) >= 601]


def test_settle_alone():
    region = np.pad(np.random.default_rng(0).random((30, 30)) < 0.97, 1)
    squared = brute_squared(region)
    depth, pixels = _settle(region, np.argwhere(region), 1)
    assert depth == squared.max() > 4
    assert pixels.tolist() == np.argwhere(squared == depth).tolist()


def test_next_click_by_hand():
    truth = block(20, 30, 2, 3, 9, 12)  # 7 x 9: the middle row's three columns in the centre are deepest
    empty = np.zeros_like(truth)
    assert next_click(truth, empty, []) == Click(6, 5, True)
    assert next_click(empty, truth, []) == Click(6, 5, False)
    assert next_click(truth, empty, [], rule="ritm") == Click(6, 5, True)
    draws = {next_click(truth, empty, [], rule="hrsam", rng=random.Random(seed)) for seed in range(30)}
    assert draws == {Click(6, 5), Click(7, 5), Click(8, 5)}


@pytest.mark.parametrize("rule", ["frozen", "hrsam", "ritm"])
def test_equal_errors_give_a_negative_click(rule):
    missed, extra = block(12, 24, 1, 1, 8, 8), block(12, 24, 1, 12, 8, 19)
    assert next_click(missed, extra, [], rule=rule, rng=random.Random(0)) == Click(15, 4, False)
    missed |= block(12, 24, 0, 0, 9, 9)
    assert next_click(missed, extra, [], rule=rule, rng=random.Random(0)) == Click(4, 4, True)


def test_clicked_pixels_before_or_after_the_transform():
    truth = block(41, 41, 0, 0, 41, 41)
    empty, clicks = np.zeros_like(truth), [Click(20, 20)]
    beside, far = next_click(truth, empty, clicks, rule="ritm"), next_click(truth, empty, clicks)
    assert beside == Click(19, 19)  # 20 deep, first of the eight around
    holes = truth.copy()
    holes[20, 20] = False
    squared = brute_squared(holes)
    first = np.argwhere(squared == squared.max())[0]
    assert (far.y, far.x) == tuple(first)
    assert np.hypot(far.x - 20, far.y - 20) > 10


def test_nothing_wrong():
    truth = block(9, 9, 2, 2, 6, 6)
    assert next_click(truth, truth, []) is None
    assert next_click(truth, truth, [], rule="hrsam", rng=random.Random(0)) is None
    assert next_click(truth, truth, [], rule="ritm") == Click(0, 0, False)
    one = block(9, 9, 4, 4, 5, 5)
    clicks = [Click(4.3, 3.6)]
    assert next_click(one, np.zeros_like(one), clicks) is None  # the only wrong pixel was clicked


def test_rules_agree_on_the_candidates_of_the_first_click():
    for seed in range(5):
        truth = blobs(24, 24, seed)
        squared = brute_squared(truth)
        best = {(x, y) for y, x in np.argwhere(squared == squared.max())}
        drawn = [next_click(truth, truth & False, [], rule="hrsam", rng=random.Random(s)) for s in range(60)]
        assert {(c.x, c.y) for c in drawn} == best
        assert next_click(truth, truth & False, [], rule="ritm") == next_click(truth, truth & False, [])


def test_hrsam_draw_is_uniform():
    truth, rng = block(13, 13, 0, 0, 13, 13), random.Random(0)
    truth[6, 6] = False  # four deepest pixels, one in each quarter
    squared = brute_squared(truth)
    best = [tuple(p) for p in np.argwhere(squared == squared.max())]
    counts = dict.fromkeys(best, 0)
    for _ in range(400):
        click = next_click(truth, truth & False, [], rule="hrsam", rng=rng)
        counts[int(click.y), int(click.x)] += 1
    assert len(best) == 4
    assert chi_squared(list(counts.values())) < 16.3


def chi_squared(counts):
    expected = sum(counts) / len(counts)
    return sum((n - expected) ** 2 / expected for n in counts)


def test_next_click_refuses():
    truth = np.ones((4, 5), dtype=bool)
    with pytest.raises(ValueError, match="bool arrays"):
        next_click(truth, truth.astype(np.uint8), [])
    with pytest.raises(ValueError, match=r"\(4, 5\) and bool \(5, 4\)"):
        next_click(truth, truth.T, [])
    with pytest.raises(ValueError, match="unknown click rule 'sam'"):
        next_click(truth, truth, [], rule="sam")
    with pytest.raises(ValueError, match="rng"):
        next_click(truth, truth, [], rule="hrsam")
    with pytest.raises(ValueError, match=r"click 0 .* outside"):
        next_click(truth, truth, [Click(5, 0)])


def test_batch_user_equals_the_single_one():
    truth = np.stack([blobs(30, 41, seed) for seed in range(24)])
    mask = np.stack([blobs(30, 41, 100 + seed) for seed in range(24)])
    xy, positive, any_wrong = simulate_clicks(*map(torch.from_numpy, (truth, mask)), generator(), spread=1.0)
    assert any_wrong.all()
    assert xy.dtype == torch.float32
    unique = 0
    for t, m, (x, y), label in zip(truth, mask, xy.tolist(), positive.tolist()):
        error = t & ~m if label else m & ~t
        other = m & ~t if label else t & ~m
        squared, rival = brute_squared(error), brute_squared(other)
        assert squared[int(y), int(x)] == squared.max()
        assert squared.max() > rival.max() if label else squared.max() >= rival.max()
        if (squared == squared.max()).sum() == 1:
            unique += 1
            assert next_click(t, m, []) == Click(x, y, label)
    assert unique > 3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_batch_draw_is_uniform_above_the_spread(as_tensor):
    truth = torch.from_numpy(
        block(20, 24, 2, 3, 19, 20)
    )  # 17 x 17: greatest distance 9, candidates from 9 / 1.8 = 5 on
    batch = truth.expand(3000, -1, -1)
    spread = torch.full((3000,), 1.8) if as_tensor else 1.8
    xy, positive, _ = simulate_clicks(batch, torch.zeros_like(batch), generator(), spread=spread)
    counts = torch.zeros(20, 24, dtype=torch.int64)
    counts.index_put_((xy[:, 1].long(), xy[:, 0].long()), torch.ones(3000, dtype=torch.int64), accumulate=True)
    expected = block(20, 24, 6, 7, 15, 16)  # exactly 5 deep is included: 9 x 9
    assert positive.all()
    assert np.array_equal(counts.numpy() > 0, expected)
    assert chi_squared(counts[torch.from_numpy(expected)].tolist()) < 124.8  # 80 degrees of freedom, p = 0.001


def test_batch_spread_is_per_picture():
    truth = torch.from_numpy(block(21, 21, 0, 0, 21, 21)).expand(400, -1, -1)
    spread = torch.where(torch.arange(400) % 2 == 0, 1.0, 1.7)
    xy, _, _ = simulate_clicks(truth, torch.zeros_like(truth), generator(), spread=spread)
    centred = (xy == 10).all(1)
    assert centred[::2].all()
    assert centred[1::2].float().mean() < 0.2


def test_batch_where_nothing_is_wrong():
    some, none = torch.from_numpy(block(8, 8, 2, 2, 5, 6)), torch.zeros(8, 8, dtype=torch.bool)
    truth = torch.stack((some, none, some))
    mask = torch.stack((some, none, none))
    for seed in range(20):
        xy, positive, any_wrong = simulate_clicks(truth, mask, generator(seed), spread=1.7)
        assert any_wrong.tolist() == [False, False, True]
        assert positive.tolist() == [True, False, True]
        for i in (0, 2):
            assert truth[i, int(xy[i, 1]), int(xy[i, 0])]
        assert (xy[1] >= 0).all()
        assert (xy[1] < 8).all()


def test_batch_user_repeats_with_its_seed():
    truth = torch.from_numpy(np.stack([blobs(20, 20, s) for s in range(8)]))
    first, again, other = (
        simulate_clicks(truth, truth & False, generator(seed), spread=3.0)[0] for seed in (1, 1, 2)
    )  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_user_refuses():
    truth = torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool tensors"):
        simulate_clicks(truth, truth.float(), generator(), spread=1.0)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and torch.bool \(1, 4, 4\)"):
        simulate_clicks(truth, truth[:1], generator(), spread=1.0)
    with pytest.raises(ValueError, match=r"at least 1; got 0\.5"):
        simulate_clicks(truth, truth, generator(), spread=0.5)
    with pytest.raises(ValueError, match=r"real must be bool \(2, 4, 4\) as truth; got torch.bool \(4, 4\)"):
        simulate_clicks(truth, truth, generator(), spread=1.0, real=truth[0])
    with pytest.raises(ValueError, match=r"real must be bool \(2, 4, 4\) as truth; got torch.int64"):
        random_clicks(truth, 3, generator(), real=truth.long())
    with pytest.raises(ValueError, match="a batch of 2 needs as many draws; got 3"):
        simulate_clicks(truth, truth, Draws([generator(), generator()], [1, 2]), spread=1.0)
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        random_clicks(truth[0], 3, generator())


WINDOWS = [(24, 9), (11, 30), (17, 17), (1, 1), (24, 30)]
ROWS = [2, 1, 3, 2, 1]


def padded_pictures(beyond):
    """Truths, masks and windows (9, 24, 30), what is beyond each window ``beyond``; and the same (K, h, w) of each picture.

    With everything that has a rule of its own: no object, nothing else, nothing wrong, all of it wrong.
    """
    each = []
    for i, ((h, w), count) in enumerate(zip(WINDOWS, ROWS)):
        truth, mask = (np.stack([blobs(h, w, seed + 10 * i + k) for k in range(count)]) for seed in (0, 100))
        if i == 2:
            truth[0], truth[1], mask[2] = False, True, truth[2]
        elif i == 3:
            truth[:], mask[:] = [[[True]], [[False]]], False
        each.append((torch.from_numpy(truth), torch.from_numpy(mask)))
    tops = [torch.ones(count, h, w, dtype=torch.bool) for (h, w), count in zip(WINDOWS, ROWS)]

    def padded(maps, value):
        return torch.cat(
            [torch.nn.functional.pad(m, (0, 30 - m.shape[2], 0, 24 - m.shape[1]), value=value) for m in maps]
        )

    truths, masks = zip(*each)
    return padded(truths, beyond[0]), padded(masks, beyond[1]), padded(tops, False), each


@pytest.mark.parametrize("beyond", [(False, False), (False, True), (True, False), (True, True)])
def test_padded_pictures_are_clicked_as_alone(beyond):
    """To the bit: the distances, and what each draws from its own generator, round after round."""
    truth, mask, real, each = padded_pictures(beyond)
    together, alone = ([generator(i) for i in range(len(ROWS))] for _ in range(2))
    draws = Draws(together, ROWS)
    spread = torch.linspace(1, 2.5, len(truth))
    for number in range(3):
        if number == 0:
            xy, positive = random_clicks(truth, 20, draws, real=real)
        else:
            xy, positive, any_wrong = simulate_clicks(truth, mask, draws, spread=spread, real=real)
        for i, ((t, m), (h, w)) in enumerate(zip(each, WINDOWS)):
            rows = slice(sum(ROWS[:i]), sum(ROWS[: i + 1]))
            if number == 0:
                want = random_clicks(t, 20, alone[i])
            else:
                want = simulate_clicks(t, m, alone[i], spread=spread[rows])
                assert torch.equal(any_wrong[rows], want[2])
                wrong = (truth & ~mask & real)[rows]
                assert torch.equal(squared_distance(wrong)[:, :h, :w], squared_distance(t & ~m))
            assert torch.equal(xy[rows], want[0])
            assert torch.equal(positive[rows], want[1])
            assert (xy[rows] < torch.tensor([w, h])).all()


def test_random_clicks():
    truth = torch.from_numpy(np.stack([block(9, 14, 1, 2, 6, 11), block(9, 14, 0, 0, 9, 14), block(9, 14, 0, 0, 0, 0)]))
    xy, positive = random_clicks(truth, 4000, generator())
    assert xy.shape == (3, 4000, 2)
    assert positive.shape == (3, 4000)
    rows, cols = xy[..., 1].long(), xy[..., 0].long()
    assert torch.equal(truth[torch.arange(3)[:, None], rows, cols], positive)
    assert positive[1].all()
    assert not positive[2].any()
    assert abs(positive[0].float().mean() - 0.6) < 0.03  # four standard deviations
    for label, size in ((True, 45), (False, 81)):
        counts = torch.bincount((rows * 14 + cols)[0][positive[0] == label], minlength=126).view(9, 14)
        counts = counts[truth[0] == label]
        assert len(counts) == size
        assert chi_squared(counts.tolist()) < size + 4 * (2 * size) ** 0.5
