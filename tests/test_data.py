"""Data sets on disk, the photo bank, and the canvases made from it."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hrsam.data.bank import PhotoBank, box_and_anchor, make_entry
from hrsam.data.jpeg import jpeg_artefacts
from hrsam.data.transforms import MEAN, STD, CanvasSettings, make_batch
from hrsam.data.warp import Placement, linear, warp

RED = (230, 20, 20)
COLOURS = (RED, (20, 210, 20), (30, 30, 240), (230, 220, 20), (20, 220, 220))
PLAIN = {"rotate": 0, "colour": 0, "grey": 0, "blur": 0, "noise": 0, "jpeg": 0, "copy_paste": 0}
STILL = PLAIN | {"whole_photo": 1, "whole_photo_scale": (1, 1), "aspect": 0, "mirror": 0}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def save_photo(root, stem, shape, colour, *masks, background=(90, 90, 90)):
    pixels = np.full((*shape, 3), background, np.uint8)
    for mask in masks:
        pixels[mask] = colour
    save(root / "images" / f"{stem}.png", pixels)
    for k, mask in enumerate(masks):
        name = f"{stem}.png" if len(masks) == 1 else f"{stem}_{k}.png"
        save(root / "masks" / name, mask.astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Five photos, each with a disc of its own colour; the second has two."""
    root = tmp_path_factory.mktemp("train") / "part"
    shapes = ((64, 64), (48, 64), (64, 40), (64, 56), (50, 50))
    for i, (shape, colour) in enumerate(zip(shapes, COLOURS)):
        masks = [disc(*shape, 28, 22, 14)] + ([disc(*shape, 20, 50, 8)] if i == 1 else [])
        save_photo(root, f"{i:05d}", shape, colour, *masks)
    return PhotoBank.load([root], long_side=64, threads=2)


def draw(bank, batch, side, seed=0, **settings):
    return make_batch(bank, batch, side, torch.Generator().manual_seed(seed), CanvasSettings(**settings))


def bytes_of(pixels):
    return pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def near(pixels, colour, reach=60):
    """(B, H, W): where pixels of the canvas have this colour."""
    return (bytes_of(pixels) - torch.tensor(colour).view(3, 1, 1)).abs().amax(1) < reach


def grown(mask, by):
    return F.max_pool2d(mask.float().unsqueeze(1), 2 * by + 1, 1, by).squeeze(1) > 0


def shrunk(mask, by):
    return ~grown(~mask, by)


# ---------------------------------------------------------------- on disk


def test_what_is_wrong_on_disk_is_named(tmp_path):
    def complaint():
        with pytest.raises(ValueError) as caught:
            PhotoBank.load([root], long_side=64)
        return str(caught.value)

    root = tmp_path / "a"
    assert "no folder" in complaint()
    save_photo(root, "whole", (20, 20), RED, disc(20, 20, 5, 5, 3))
    save_photo(root, "bare", (20, 20), RED)
    save(root / "masks/stray_0.png", np.full((20, 20), 255, np.uint8))
    assert "bare.png without mask and stray_0.png without picture" in complaint()
    save(root / "images/stray.png", np.zeros((20, 21, 3), np.uint8))
    save(root / "masks/bare.png", np.zeros((20, 20), np.uint8))
    both = complaint()
    assert both.startswith("2 of 3 photos")
    assert "bare.png holds no object" in both
    assert "stray_0.png is 20x20 and its picture stray.png 21x20" in both
    save(root / "images/bare.bmp", np.zeros((20, 20, 3), np.uint8))
    assert "share a stem" in complaint()


# ---------------------------------------------------------------- photo bank


def test_bank_holds_what_the_files_hold(bank):
    assert (len(bank), bank.side, bank.masks.shape[0]) == (5, 64, 6)
    assert bank.first.tolist() == [0, 1, 3, 4, 5]
    assert bank.owners.tolist() == [0, 1, 1, 2, 3, 4]
    samples = list(bank.samples())
    assert samples[2].pixels.shape == (48, 64, 3)
    assert np.array_equal(samples[2].mask, disc(48, 64, 20, 50, 8))
    assert tuple(samples[2].pixels[20, 50]) == COLOURS[1]
    assert bank.boxes[2].tolist() == [42, 12, 59, 29]
    assert bank.anchors[2].tolist() == [50.5, 20.5]
    assert torch.equal(bank.photos[1, :, 48:], bank.photos[1, :, 47:48].expand(3, 16, 64))  # the last row goes on
    for k in range(6):
        x, y = bank.anchors[k].long().tolist()
        assert bank.masks[k, y, x] == 255


def test_bank_shrinks_large_photos_and_sorts_over_folders(tmp_path):
    ring = disc(200, 100, 60, 50, 40) & ~disc(200, 100, 60, 50, 20)
    save_photo(tmp_path / "x", "2", (200, 100), RED, ring)
    save_photo(tmp_path / "y", "1", (16, 16), RED, disc(16, 16, 8, 8, 5))
    bank = PhotoBank.load([tmp_path / "x", tmp_path / "y"], long_side=64, threads=1)
    assert bank.names == ("y/1", "x/2")
    assert bank.sizes.tolist() == [[16, 16], [32, 64]]
    expected = torch.tensor([10, 20, 91, 101]) * 0.32
    torch.testing.assert_close(bank.boxes[1], expected, atol=1.0, rtol=0)
    x, y = bank.anchors[1].long().tolist()
    assert bank.masks[1, y, x] == 255  # the middle of a ring is no part of it


def test_a_bank_of_entries_is_what_numpy_makes_of_them():
    """Photos of all shapes, one as large as its square, with one to three masks."""
    rng = np.random.default_rng(0)
    shapes, counts = ((40, 64), (64, 21), (64, 64), (1, 64), (7, 5)), (1, 3, 2, 1, 2)
    photos = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    masks = [rng.random((count, *shape)) < 0.3 for shape, count in zip(shapes, counts)]
    bank = PhotoBank.of([make_entry(*both, f"part/{i}") for i, both in enumerate(zip(photos, masks))], 64)
    assert bank.names == tuple(f"part/{i}" for i in range(5))
    assert bank.sizes.tolist() == [[width, height] for height, width in shapes]
    assert (bank.count.tolist(), bank.first.tolist()) == ([1, 3, 2, 1, 2], [0, 1, 4, 6, 7])
    assert bank.owners.tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4]
    for i, pixels in enumerate(photos):
        beyond = [(0, 64 - side) for side in shapes[i]]
        assert np.array_equal(bank.photos[i], np.pad(pixels.transpose(2, 0, 1), [(0, 0), *beyond], mode="edge"))
        assert np.array_equal(bank.colours[i], (pixels.mean((0, 1)) / 255).astype(np.float32))
        for k, mask in enumerate(masks[i], start=int(bank.first[i])):
            assert np.array_equal(bank.masks[k], np.pad(mask, beyond, mode="edge") * np.uint8(255))
            box, anchor = box_and_anchor(mask)
            assert (tuple(bank.boxes[k].tolist()), tuple(bank.anchors[k].tolist())) == (box, anchor)


def test_split_is_disjoint_and_complete(bank):
    train, held_out = bank.split(every=2)
    assert train.names == bank.names[::2]
    assert held_out.names == bank.names[1::2]
    whole = {s.name: s for s in bank.samples()}
    parts = [s for part in (train, held_out) for s in part.samples()]
    assert sorted(s.name for s in parts) == sorted(whole)
    assert all(np.array_equal(s.mask, whole[s.name].mask) for s in parts)
    assert all(np.array_equal(s.pixels, whole[s.name].pixels) for s in parts)
    assert held_out.owners.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="every=9"):
        bank.split(every=9)


# ---------------------------------------------------------------- canvases


def test_equal_seeds_give_equal_batches(bank):
    one, again, other = (draw(bank, 3, 64, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.truth, again.truth)
    assert not torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("mirror", [0, 1])
def test_with_everything_off_the_canvas_is_the_photo(bank, mirror):
    unscaled, _ = bank.split(every=5)  # the last photo is smaller than the canvas and would be enlarged
    batch = draw(unscaled, 24, 64, **STILL | {"mirror": mirror, "top_left": 1, "target_weights": (1, 0, 0, 0)})
    seen = set()
    for pixels, truth, valid in zip(bytes_of(batch.pixels), batch.truth[:, 0], batch.valid[:, 0]):
        width, height = int(valid.any(0).sum()), int(valid.any(1).sum())
        assert valid[:height, :width].all()
        pixels, truth = (
            t[..., :height, :width].flip(-1) if mirror else t[..., :height, :width] for t in (pixels, truth)
        )
        (sample,) = (s for s in unscaled.samples() if np.array_equal(s.mask, truth))
        want = torch.from_numpy(sample.pixels).permute(2, 0, 1).float()
        torch.testing.assert_close(pixels, want, atol=0.01, rtol=0)
        seen.add(sample.name)
    assert len(seen) == 5


def warped(photo, masks, size, placement, side):
    """What :func:`warp` reads for one canvas, by definition: each pixel by itself, in float64."""
    (a, b), (c, d) = placement.matrix.double().tolist()
    (sx, sy), (tx, ty), (width, height) = (x.double().tolist() for x in (placement.source, placement.target, size))
    smooth = F.avg_pool2d(masks.double() / 255, 3, 1, 1, count_include_pad=False) * 0.7 + masks.double() / 255 * 0.3
    planes, shrink = torch.cat((photo.double() / 255, smooth)), 1.0
    while shrink > 1 / 8 and abs(a * d - b * c) ** 0.5 / shrink < 2**-0.7:
        planes, shrink = F.avg_pool2d(planes, 2), shrink / 2
    y, x = (places + 0.5 for places in np.mgrid[:side, :side])
    u = (d * (x - tx) - b * (y - ty)) / (a * d - b * c) + sx
    v = (a * (y - ty) - c * (x - tx)) / (a * d - b * c) + sy
    inside = (u >= 0) & (u <= width) & (v >= 0) & (v <= height)
    u, v = (np.maximum(np.minimum(p * shrink, n * shrink - 0.5), 0.5) - 0.5 for p, n in ((u, width), (v, height)))
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    right, below = (np.minimum(place + 1, planes.shape[-1] - 1) for place in (left, top))
    across, down = u - left, v - top
    planes = planes.numpy()
    upper = planes[:, top, left] * (1 - across) + planes[:, top, right] * across
    lower = planes[:, below, left] * (1 - across) + planes[:, below, right] * across
    return upper * (1 - down) + lower * down, inside


def test_photos_are_seen_where_their_placement_says():
    """At all levels, turned, stretched and mirrored, against the definition."""
    rng, side = torch.Generator().manual_seed(0), 48
    shapes = ((64, 64), (40, 64), (64, 23), (9, 64))
    made = np.random.default_rng(0)
    entries = [
        make_entry(made.integers(0, 256, (*shape, 3), dtype=np.uint8), made.random((2, *shape)) < 0.5, str(i))
        for i, shape in enumerate(shapes)
    ]
    bank = PhotoBank.of(entries, 64)
    count = 24
    photo = torch.arange(count) % 4
    masks = torch.stack((bank.first[photo], bank.first[photo] + 1), 1)
    across, angle = torch.exp2(-5 * torch.rand(count, generator=rng) + 1.5), torch.rand(count, generator=rng) * 6
    matrix = linear(across, across * 1.2, torch.rand(count, generator=rng) < 0.5, angle)
    source = bank.sizes[photo] * torch.rand(count, 2, generator=rng)
    placement = Placement(matrix, source, side * torch.rand(count, 2, generator=rng))
    colours, soft, valid = warp(bank, photo, masks, placement, side)
    for i in range(count):
        own = Placement(*(x[i] for x in (matrix, source, placement.target)))
        want, inside = warped(bank.photos[photo[i]], bank.masks[masks[i]], bank.sizes[photo[i]], own, side)
        np.testing.assert_allclose(torch.cat((colours[i], soft[i])), want, atol=2e-4)
        assert np.array_equal(valid[i, 0], inside)


@pytest.mark.parametrize("chance", ["copy_paste", "blur", "noise", "jpeg"])
def test_what_is_left_out_is_as_if_it_never_came_up(bank, chance):
    """The draws after it are the same."""
    never, hardly = (draw(bank, 6, 64, seed=3, **{chance: value}) for value in (0, 1e-12))
    assert torch.equal(never.pixels, hardly.pixels)
    assert torch.equal(never.truth, hardly.truth)
    assert not torch.equal(never.pixels, draw(bank, 6, 64, seed=3, **{chance: 1}).pixels)


def test_mask_lies_on_its_object(bank):
    batch = draw(bank, 48, 96, **PLAIN | {"rotate": 1, "target_weights": (1, 0, 0, 0)})
    drawn = torch.stack([near(batch.pixels, colour, 90) for colour in COLOURS]).any(0)
    truth = batch.truth[:, 0]
    assert (truth & ~grown(drawn, 1)).sum() == 0
    others = grown(truth, 1) | (~truth & _second_disc(batch))
    assert (shrunk(drawn, 1) & ~others).sum() == 0
    assert truth.flatten(1).float().mean(1).std() > 0.05  # scales differ


def _second_disc(batch):
    """The green photo has another green disc, which is no target here."""
    return near(batch.pixels, COLOURS[1], 90)


def test_padding_is_exactly_zero(bank):
    batch = draw(bank, 32, 64, rotate=1, noise=1, jpeg=1, blur=1)
    outside = ~batch.valid
    assert 0.05 < outside.float().mean() < 0.6
    assert (batch.pixels * outside == 0).all()
    assert (batch.truth & outside).sum() == 0
    assert (batch.pixels != 0).all(1, keepdim=True)[batch.valid].float().mean() > 0.99
    assert batch.pixels.dtype == torch.float32
    assert bytes_of(batch.pixels)[batch.valid.expand_as(batch.pixels)].max() < 255.01


def test_small_photos_lie_in_the_corner_or_inside(bank):
    for top_left, share in ((1, 1.0), (0, 0.3)):
        options = STILL | {"whole_photo_scale": (0.5, 0.5), "top_left": top_left}
        corner = draw(bank, 40, 64, **options).valid[:, 0, 0, 0].float().mean()
        assert corner == 1 if share == 1 else corner < share
    valid = draw(bank, 40, 64, **STILL | {"whole_photo_scale": (0.5, 0.5), "top_left": 0}).valid
    area = valid.flatten(1).sum(1)
    assert (area >= 32 * 20 - 40).all()  # none is pushed over the canvas' edge


def test_large_photos_leave_no_margin(bank):
    square = bank.split(every=2)[0]
    batch = draw(
        square, 40, 64, **PLAIN | {"whole_photo": 0, "scale": (2.6, 2.6), "object_size": (0.01, 9), "aspect": 0}
    )
    assert batch.valid.all()


def test_pasted_objects_cut_what_lies_below(bank):
    options = PLAIN | {"copy_paste": 1, "paste_second": 1, "paste_size": (0.4, 0.7), "target_area": (0.01, 1)}
    batch = draw(bank, 64, 64, **options, target_weights=(0, 0, 1, 1))
    first, second = batch.truth.unbind(1)
    two = (first != second).flatten(1).any(1)
    assert two.sum() > 30
    assert (first & second)[two].sum() == 0
    base = draw(bank, 64, 64, **options, target_weights=(1, 0, 0, 1))
    below, above = base.truth.unbind(1)
    assert (below & above)[(below != above).flatten(1).any(1)].sum() == 0
    for i in range(64):  # what is left of each target shows one colour only, so nothing of another object lies in it
        for mask in (*batch.truth[i], *base.truth[i]):
            inner = shrunk(mask[None], 2)[0]
            source = batch if any(mask is m for m in batch.truth[i]) else base
            hits = torch.stack([(near(source.pixels[i : i + 1], c, 40)[0] & inner).sum() for c in COLOURS])
            assert (hits > 0).sum() <= 1


def test_pasted_edges_are_anti_aliased_and_one_pixel_wide(bank):
    options = STILL | {"copy_paste": 1, "paste_second": 0, "paste_size": (0.9, 0.9), "paste_rotation": 0}
    batch = draw(bank, 16, 192, **options, target_weights=(0, 0, 1, 0))
    pure = torch.stack([near(batch.pixels, c, 3) for c in (*COLOURS, (90, 90, 90))]).any(0)
    rim = grown(batch.truth[:, 0], 2) & ~shrunk(batch.truth[:, 0], 2) & batch.valid[:, 0]
    mixed = (rim & ~pure).sum() / rim.sum()
    assert 0.53 < mixed < 0.75  # 0.46 with a hard edge, 0.91 with one as wide as a photo pixel


def test_targets_are_never_empty(tmp_path):
    line, dot = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    line[5, 3:60], dot[63, 63] = True, True
    save_photo(tmp_path, "a", (64, 64), RED, line)
    save_photo(tmp_path, "b", (64, 64), RED, dot)
    save_photo(tmp_path, "c", (64, 64), RED, np.ones((64, 64), bool))
    bank = PhotoBank.load([tmp_path], long_side=64, threads=1)
    for seed, options in enumerate(({}, PLAIN | {"whole_photo": 1}, {"copy_paste": 1, "paste_second": 1})):
        for side in (16, 64):
            assert draw(bank, 64, side, seed, **options).truth.flatten(2).any(2).all()


def test_target_weights_and_area(bank):
    some = bank.split(every=2)[1]  # photo 1 with two green discs, photo 3 with a yellow one
    both = STILL | {"top_left": 1, "target_weights": (1, 1, 0, 0)}
    batch = draw(some, 64, 64, **both)
    differ = (batch.truth[:, 0] != batch.truth[:, 1]).flatten(1).any(1)
    assert torch.equal(differ, near(batch.pixels, COLOURS[1]).flatten(1).any(1))  # two targets where there are two
    area = batch.truth.flatten(2).float().mean(2)
    small, large = area[differ].amin(), area[differ].amax()
    for limits, wanted in (((0, 0.08), small), ((0.9, 1), large)):  # one fits; none does, so the largest
        only = draw(some, 64, 64, **both | {"target_area": limits}).truth[differ]
        assert (only.flatten(2).float().mean(2) == wanted).all()
    pasted = draw(some, 64, 64, **STILL | {"copy_paste": 1, "paste_second": 0, "target_weights": (0, 1, 1, 0)})
    twice = (pasted.truth[:, 0] == pasted.truth[:, 1]).flatten(1).all(1)
    assert twice[~differ].all()  # the only object of a photo is not "another" one
    assert not twice[differ].all()


def test_a_mosaic_is_four_canvases_with_targets_in_two(bank):
    batch = draw(bank, 6, 64, seed=1, mosaic=0.5, target_area=(0.001, 0.9))
    whole = draw(bank, 3, 64, seed=1, target_area=(0.001, 0.9))
    for name in ("pixels", "truth", "valid"):
        assert torch.equal(getattr(batch, name)[:3], getattr(whole, name))
    generator = torch.Generator().manual_seed(1)
    make_batch(bank, 3, 64, generator, CanvasSettings())
    quarters = make_batch(bank, 12, 32, generator, CanvasSettings(target_area=(0.004, 0.9)))
    chosen = []
    for i in range(3):
        for k, (top, left) in enumerate(((0, 0), (0, 32), (32, 0), (32, 32))):
            place = slice(None), slice(top, top + 32), slice(left, left + 32)
            assert torch.equal(batch.pixels[3 + i][place], quarters.pixels[4 * i + k])
            assert torch.equal(batch.valid[3 + i][place], quarters.valid[4 * i + k])
            for target in batch.truth[3 + i][place]:
                assert not target.any() or torch.equal(target, quarters.truth[4 * i + k, 0])
        homes = batch.truth[3 + i].unflatten(2, (2, 32)).unflatten(1, (2, 32)).amax((2, 4)).flatten(1)  # (2, 4)
        assert homes.sum(1).tolist() == [1, 1]
        assert not (homes[0] & homes[1]).any()
        chosen += homes.int().argmax(1).tolist()
    assert len(set(chosen)) > 2


def test_the_quarters_of_mosaics_show_all_photos_in_turn(bank):
    settings = CanvasSettings(mosaic=0.4, **STILL)
    batch = make_batch(bank, 5, 64, torch.Generator().manual_seed(0), settings, torch.arange(5))
    quarters = batch.pixels[3:].unflatten(3, (2, 32)).unflatten(2, (2, 32)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    for quarter, photo in zip(quarters, (3, 4, 0, 1, 2, 3, 4, 0)):
        assert near(quarter.unsqueeze(0), COLOURS[photo]).any()


def test_shrinking_does_not_alias(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    save(tmp_path / "images/a.png", np.repeat(board[..., None], 3, 2).astype(np.uint8))
    save(tmp_path / "masks/a.png", np.full((64, 64), 255, np.uint8))
    bank = PhotoBank.load([tmp_path], long_side=64, threads=1)
    for side in (32, 24, 16, 8):
        pixels = bytes_of(draw(bank, 4, side, **STILL).pixels)
        assert (pixels - 127.5).abs().max() < 1


def test_colour_changes_do_what_they_say(bank):
    plain = draw(bank, 8, 64, **STILL)
    valid = plain.valid.expand_as(plain.pixels)
    grey = bytes_of(draw(bank, 8, 64, **STILL | {"grey": 1}).pixels)
    assert ((grey.amax(1) - grey.amin(1))[plain.valid[:, 0]] < 0.01).all()
    neutral = {"brightness": 0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0, "gamma": (1, 1)}
    same = draw(bank, 8, 64, **STILL | neutral | {"colour": 1})
    torch.testing.assert_close(same.pixels, plain.pixels, atol=1e-4, rtol=0)
    changes = ({"brightness": 0.1}, {"contrast": (0.5, 0.6)}, {"saturation": (0, 0.3)}, {"hue": 0.3}, {"gamma": (2, 3)})
    for change in changes:
        changed = draw(bank, 8, 64, **STILL | neutral | {"colour": 1} | change)
        assert (changed.pixels - plain.pixels)[valid].abs().mean() > 0.02
        assert torch.equal(changed.truth, plain.truth)
    grey_there = near(plain.pixels, (90, 90, 90), 0.001) & plain.valid[:, 0]
    for change in ({"hue": 0.3}, {"saturation": (0, 2)}):
        changed = bytes_of(draw(bank, 8, 64, **STILL | neutral | {"colour": 1} | change).pixels)
        assert (changed.movedim(1, -1)[grey_there] - 90).abs().max() < 0.01
    flat = draw(bank, 8, 64, **STILL | neutral | {"colour": 1, "contrast": (0.5, 0.6)}).pixels
    pixels = plain.valid.flatten(2).sum(2)
    means = [(bytes_of(p) * plain.valid).flatten(2).sum(2) / pixels for p in (flat, plain.pixels)]
    assert (means[0] - means[1]).abs().max() < 1


def test_blur_and_noise_change_detail_only(bank):
    plain = draw(bank, 8, 64, **STILL).pixels
    blurred = draw(bank, 8, 64, **STILL | {"blur": 1, "blur_strength": 2}).pixels
    noisy = draw(bank, 8, 64, **STILL | {"noise": 1, "noise_strength": 0.05}).pixels
    for changed in (blurred, noisy):
        assert (changed - plain).abs().mean() > 0.002
        assert (bytes_of(changed).mean((2, 3)) - bytes_of(plain).mean((2, 3))).abs().max() < 3


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_artefacts_are_those_of_jpeg(quality):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=0)
    want = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float()
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None] / 255
    got = jpeg_artefacts(pixels, torch.tensor([float(quality)]))[0] * 255
    loss = (want - pixels[0] * 255).abs().mean()
    assert (got - want).abs().mean() < 0.15 * loss + 0.7  # PIL also rounds to bytes, here and between the steps


def test_jpeg_loses_more_at_lower_quality():
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    low, middle, high = (jpeg_artefacts(pixels, torch.tensor([30.0, 70.0, 95.0])) - pixels).abs().mean((1, 2, 3))
    assert high < middle < low
    assert high < 0.03
    even = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(jpeg_artefacts(even, torch.tensor([95.0])), even, atol=1 / 255, rtol=0)


def test_wrong_arguments_and_settings_are_refused(bank):
    with pytest.raises(ValueError, match="side=60"):
        draw(bank, 1, 60)
    with pytest.raises(ValueError, match=r"side=72.*multiple of 16"):
        draw(bank, 1, 72, mosaic=1)
    with pytest.raises(ValueError, match="smaller number first"):
        CanvasSettings(scale=(2, 1))
    with pytest.raises(ValueError, match="copypaste"):
        CanvasSettings(copypaste=0)
    for name in ("aspect", "rotation", "paste_rotation", "brightness", "hue", "noise_strength"):
        with pytest.raises(ValueError, match=f"{name}\n.*greater than or equal to 0"):
            CanvasSettings(**{name: -0.1})
    with pytest.raises(ValueError, match="long_side=60"):
        PhotoBank.load([], long_side=60)


def test_mixed_precision_around_it_changes_no_pixel(bank):
    plain = draw(bank, 4, 64, copy_paste=1, colour=1, jpeg=1)
    with torch.autocast("cpu", torch.bfloat16):
        batch = draw(bank, 4, 64, copy_paste=1, colour=1, jpeg=1)
    assert torch.equal(batch.pixels, plain.pixels)
    assert torch.equal(batch.truth, plain.truth)


@pytest.mark.gpu
def test_a_batch_on_the_gpu_never_waits_for_it(bank):
    there, generator = bank.to("cuda"), torch.Generator("cuda").manual_seed(0)
    settings = CanvasSettings(mosaic=0.5)
    make_batch(there, 4, 64, generator, settings)  # constants are copied once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = make_batch(there, 4, 64, generator, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.pixels.isfinite().all()
    assert batch.truth.flatten(2).any(2).all()
