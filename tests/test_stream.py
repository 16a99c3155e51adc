"""The stream of training pictures: pure in its step, the same for any number of workers, and what happens when one fails."""

import json
import logging
import multiprocessing
import os
import random
import select
import signal
import threading
import time
from collections import deque
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from hrsam.data import shot as shots
from hrsam.data import transforms
from hrsam.data.bank import PhotoBank
from hrsam.data.jpeg import mix_colours
from hrsam.data.resize import resized
from hrsam.data.shot import load_shot, recolour
from hrsam.data.stream import Canvases, Packed, Source, Stream, StreamSettings
from hrsam.data.transforms import CanvasSettings, make_batch
from hrsam.data.workers import WorkerError
from tests.builders import photo
from tests.processes import begun

SHAPES = ((40, 64), (64, 30), (50, 50), (33, 90), (120, 80), (64, 64), (20, 100))
STILL = {"mirror": 0, "colour": 0}
QUICK = pytest.mark.usefixtures("quick_processes")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven pictures of noise; the object of each is a block of one colour, the second has another one."""
    folder = tmp_path_factory.mktemp("stream") / "part"
    for number, (height, width) in enumerate(SHAPES):
        pixels = photo(height, width, number)
        mask = (pixels == (200, 40, 90)).all(2)
        save(folder / "images" / f"p{number}.png", pixels)
        save(folder / "masks" / f"p{number}_0.png", mask.astype(np.uint8) * 255)
        if number == 1:
            save(folder / "masks" / "p1_1.png", (~mask).astype(np.uint8) * 255)
    return folder


def settings(root, **changes):
    values = {
        "data": (Source(name="pairs", root=str(root)),),
        "batch": 3,
        "workers": 0,
        "packed": Packed(sides=(32, 80)),
    }
    return StreamSettings(**{**values, **changes})


def canvases(root, **changes):
    return settings(root, packed=None, canvases=Canvases(sides=(32, 48), photo_side=64), **changes)


def photos(batch):
    return [photo for pack in batch.packs for photo in pack]


def names(batch):
    return sorted(photo.name for photo in photos(batch))


def assert_same(a, b):
    assert (a.step, type(a)) == (b.step, type(b))
    if hasattr(a, "bank"):
        assert (a.side, a.bank.names) == (b.side, b.bank.names)
        for name in ("photos", "sizes", "colours", "first", "count", "masks", "owners", "boxes", "anchors"):
            assert torch.equal(getattr(a.bank, name), getattr(b.bank, name)), name
        return
    assert [len(pack) for pack in a.packs] == [len(pack) for pack in b.packs]
    for x, y in zip(photos(a), photos(b)):
        assert (x.name, x.seed) == (y.name, y.seed)
        assert np.array_equal(x.pixels, y.pixels)
        assert np.array_equal(x.masks, y.masks)


# ---------------------------------------------------------------- what a step holds


@pytest.mark.parametrize("form", [settings, canvases])
def test_a_batch_is_a_function_of_its_step(root, form):
    one, again = Stream(form(root)), Stream(form(root))
    steps = list(range(8))
    first = [one.batch(step) for step in steps]
    for step in reversed(steps):  # nothing depends on what was asked before
        assert_same(again.batch(step), first[step])
    other = Stream(form(root, seed=1)).batch(0)
    with pytest.raises(AssertionError):
        assert_same(other, first[0])


def test_every_picture_once_an_epoch(root):
    stream = Stream(settings(root))
    assert len(stream) == 7
    seen = [shot.name for step in range(14) for shot in stream.shots(step)]  # 42 positions are six epochs
    orders = [seen[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(order) == [f"part/p{i}" for i in range(7)] for order in orders)
    assert len({tuple(order) for order in orders}) > 3
    seeds = [shot.seed for step in range(14) for shot in stream.shots(step)]
    assert len(set(seeds)) == 42  # a picture is drawn anew each time


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_pictures_of_a_step(root, world):
    """The same ones for any number of ranks, with the same seeds, so the same bytes."""
    alone = Stream(settings(root, batch=5))
    shared = Stream(settings(root, batch=5), world=world)
    for step in range(7):
        shares = [shared.shots(step, rank) for rank in range(world)]
        assert all(shares)
        assert sorted((shot for share in shares for shot in share), key=lambda shot: shot.seed) == sorted(
            alone.shots(step), key=lambda shot: shot.seed
        )


def test_ranks_get_equal_work_not_equal_counts(tmp_path):
    """One square has as many tokens as four narrow pictures of its length, as the heads of the files say."""
    for number, width in enumerate((64, 16, 16, 16, 16)):
        save(tmp_path / "images" / f"{number}.png", np.zeros((64, width, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.full((64, width), 255, np.uint8))
    run = settings(tmp_path, batch=5, packed=Packed(sides=(64, 64)))
    for step in range(4):
        shares = [{s.name[-1] for s in Stream(run, world=2).shots(step, rank)} for rank in (0, 1)]
        assert shares == [{"0"}, {"1", "2", "3", "4"}]
    one_each = Stream(run, world=2, measure=lambda height, width: (1, 1.0))
    assert len(one_each.shots(0)) == 3


def test_packs_keep_to_their_tokens_and_say_once_what_is_too_long(root, caplog):
    stream = Stream(settings(root, batch=7, packed=Packed(sides=(64, 96), tokens=20)))
    with caplog.at_level(logging.WARNING, logger="hrsam"):
        batches = [stream.batch(step) for step in range(4)]
    long = 0
    for batch in batches:
        assert names(batch) == [f"part/p{i}" for i in range(7)]
        for pack in batch.packs:
            held = sum(photo.counts.tokens for photo in pack)
            assert held <= 20 or len(pack) == 1
            long += held > 20
    assert long > 1
    assert sum("more than a pack of 20" in record.message for record in caplog.records) == 1
    wide = Stream(settings(root, batch=7, packed=Packed(sides=(64, 96), tokens=10_000))).batch(0)
    assert len(wide.packs) == 1
    with_anchor = Stream(settings(root, batch=2), measure=lambda height, width: (20_000, 1.0)).batch(0)
    assert len(with_anchor.packs) == 2  # the measure counts, not the photos' own grids


# ---------------------------------------------------------------- what happens to a picture


def test_pictures_keep_their_shape_and_masks_lie_on_their_objects(root):
    stream, seen = Stream(settings(root, packed=Packed(sides=(32, 80), colour=0))), set()
    for step in range(20):
        for shot, packed in zip(stream.shots(step), map(load_shot, stream.shots(step))):
            number = int(shot.name[-1])
            height, width = packed.pixels.shape[:2]
            assert 32 <= max(height, width) <= 80
            assert (height, width) == resized(*SHAPES[number], shot.side, enlarge=True)
            assert abs(height / width - SHAPES[number][0] / SHAPES[number][1]) < 0.04
            assert packed.masks.shape[1:] == (height, width)
            assert packed.counts == (len(packed.masks), -(-height // 16) * -(-width // 16), height * width)
            near = np.abs(packed.pixels.astype(int) - (200, 40, 90)).sum(2) < 25
            if number != 1:  # the object's colour is inside, less an edge that is mixed, and nowhere else
                assert (near & packed.masks[0]).sum() > 0.25 * packed.masks[0].sum()
                assert (near & ~packed.masks[0]).sum() < 0.05 * packed.masks[0].sum() + 3
            right = packed.masks[0][:, width // 2 :].sum() > packed.masks[0][:, : width // 2].sum()
            seen.add((number, bool(right)))
    assert all((number, side) in seen for number in (0, 2, 3) for side in (True, False))  # some are mirrored, some not


def test_nothing_is_changed_when_nothing_is_asked(root):
    stream = Stream(settings(root, batch=7, packed=Packed(sides=(64, 64), **STILL)))
    for photo_ in photos(stream.batch(0)):
        if photo_.name == "part/p5":
            assert np.array_equal(photo_.pixels, photo(64, 64, 5))
            assert np.array_equal(photo_.masks[0], (photo(64, 64, 5) == (200, 40, 90)).all(2))


def test_objects_of_a_picture_are_drawn_up_to_a_number(root):
    both = Stream(settings(root, batch=7, objects=2)).batch(0)
    assert {photo.name: len(photo.masks) for photo in photos(both)} == {f"part/p{i}": 1 + (i == 1) for i in range(7)}
    one = Stream(settings(root, batch=7, objects=1))
    drawn = [
        photo.masks[0].mean() > 0.5 for step in range(12) for photo in photos(one.batch(step)) if "p1" in photo.name
    ]
    assert len(drawn) == 12
    assert True in drawn
    assert False in drawn


def test_objects_too_small_or_large_give_way_and_thin_ones_survive(tmp_path):
    save(tmp_path / "images" / "a.png", photo(300, 300))
    tiny, whole, thin = (np.zeros((300, 300), np.uint8) for _ in range(3))
    tiny[7, 299], whole[:], thin[100, :150] = 255, 255, 255
    for k, mask in enumerate((tiny, whole, thin)):
        save(tmp_path / "masks" / f"a_{k}.png", mask)
    stream = Stream(settings(tmp_path, batch=4, packed=Packed(sides=(16, 16), **STILL)))
    for shot in stream.shots(0):
        (mask,) = load_shot(shot).masks
        assert mask.sum() == 8  # the line over half of the picture, 150 pixels of 300, is 8 of 16 long
        assert mask.any(1).sum() == 1
    tiny = np.pad(tiny, ((0, 600), (600, 0)))  # of a pixel less than a thousandth is left
    save(tmp_path / "far" / "images" / "a.png", photo(900, 900))
    save(tmp_path / "far" / "masks" / "a.png", tiny)
    far = Stream(settings(tmp_path / "far", batch=1, packed=Packed(sides=(16, 16), **STILL)))
    (mask,) = load_shot(far.shots(0)[0]).masks
    assert np.argwhere(mask).tolist() == [[0, 15]]  # it is where it was


def test_colours_change_and_geometry_does_not():
    pixels = photo(40, 50)
    changed = [recolour(pixels, 1.0, seed) for seed in range(8)]
    for one in changed:
        assert one.dtype == np.uint8
        assert one.shape == pixels.shape
        assert 2 < np.abs(one.astype(int) - pixels).mean() < 100
        flat = one[10:20, 20:45].reshape(-1, 3)
        assert (flat == flat[0]).all()  # equal colours stay equal
    assert len({one.tobytes() for one in changed}) == 8
    assert np.array_equal(recolour(pixels, 1.0, 3), changed[3])
    same = [np.array_equal(recolour(pixels, 1e-9, seed), pixels) for seed in range(60)]
    assert 50 <= sum(same) < 60  # grey is drawn by itself, with a chance of 6 %


def test_colours_are_those_of_canvases():
    """The same draws give the same colours as in a batch of canvases, but for rounding."""
    pixels = photo(40, 48)
    for seed in range(12):
        dice = transforms.Dice(torch.Generator().manual_seed(seed), 1)
        colours = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) / 255
        run = CanvasSettings(colour=0.7)
        changed = mix_colours(colours, *transforms.colour_change(colours.mean((2, 3)), dice, run)).clamp(0, 1)
        want = changed ** dice.sometimes(0.7, dice.uniform(*run.gamma), 1.0) * 255
        got = torch.from_numpy(recolour(pixels, 0.7, seed)).permute(2, 0, 1)
        dark = want[0] < 16  # there a gamma below 1 spreads the first rounding
        assert (got - want[0]).abs()[~dark].max() < 2


def test_canvases_come_from_the_bank_that_holds_the_files(root):
    """The photos of an epoch, put together, are those that :class:`PhotoBank` reads by itself."""
    whole = PhotoBank.load([root], long_side=64, threads=1)
    batch = Stream(canvases(root, batch=7)).batch(0)
    assert batch.side in (32, 48)
    assert sorted(batch.bank.names) == list(whole.names)
    for i, name in enumerate(batch.bank.names):
        j = whole.names.index(name)
        assert torch.equal(batch.bank.photos[i], whole.photos[j])
        assert torch.equal(batch.bank.sizes[i], whole.sizes[j])
        torch.testing.assert_close(batch.bank.colours[i], whole.colours[j])
        if name != "part/p1":  # its two masks come in a drawn order
            k, m = batch.bank.first[i], whole.first[j]
            assert torch.equal(batch.bank.masks[k], whole.masks[m])
            assert torch.equal(batch.bank.boxes[k], whole.boxes[m])
            assert torch.equal(batch.bank.anchors[k], whole.anchors[m])
    assert len(list(batch.bank.samples())) == 8
    made = make_batch(batch.bank, 4, batch.side, torch.Generator().manual_seed(0), CanvasSettings())
    assert made.pixels.shape == (4, 3, batch.side, batch.side)
    sides = {Stream(canvases(root)).batch(step).side for step in range(12)}
    assert sides == {32, 48}


def test_large_jpegs_are_not_decoded_whole_and_lie_under_their_masks(tmp_path, monkeypatch):
    pixels = np.full((603, 805, 3), 90, np.uint8)
    pixels[401:, 299:] = (200, 40, 90)
    mask = (pixels == (200, 40, 90)).all(2)
    save(tmp_path / "images" / "a.jpg", pixels)
    save(tmp_path / "masks" / "a.png", mask.astype(np.uint8) * 255)
    shapes = []
    resize = shots.resize
    monkeypatch.setattr(shots, "resize", lambda array, size: shapes.append(array.shape) or resize(array, size))
    run = settings(tmp_path, batch=1, packed=None, canvases=Canvases(sides=(64,), photo_side=64))
    bank = Stream(run).batch(0).bank
    assert shapes[0] == (75, 101, 3)
    assert bank.sizes.tolist() == [[64, 48]]
    seen = (bank.photos[0].int() - torch.tensor([200, 40, 90]).view(3, 1, 1)).abs().sum(
        0
    ) < 80  # nearer than the other colour
    wrong = seen ^ (bank.masks[0] > 0)
    assert wrong.sum() < 0.02 * seen.sum()
    whole = PhotoBank.load([tmp_path], long_side=64, threads=1)
    assert torch.equal(bank.photos, whole.photos)


def test_sets_count_by_their_pictures(root, tmp_path):
    save(tmp_path / "other" / "images" / "q.png", photo(30, 30))
    save(tmp_path / "other" / "masks" / "q.png", np.full((30, 30), 255, np.uint8))
    two = (Source(name="pairs", root=str(root)), Source(name="pairs", root=str(tmp_path / "other")))
    stream = Stream(settings(root, data=two, batch=8))
    assert len(stream) == 8
    assert sorted(shot.name for shot in stream.shots(3)) == ["other/q"] + [f"part/p{i}" for i in range(7)]


def coco_set(folder):
    save(folder / "images" / "a.png", photo(40, 60))
    entry = {"id": 1, "width": 60, "height": 40, "file_name": "a.png"}
    square = {"id": 5, "image_id": 1, "category_id": 1, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    content = {"images": [entry], "annotations": [square], "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))


def davis_set(folder):
    save(folder / "img" / "a.png", photo(40, 60))
    save(folder / "gt" / "a.png", np.pad(np.full((20, 20), 255, np.uint8), ((10, 10), (10, 30))))


@QUICK
@pytest.mark.parametrize(("name", "make"), [("coco", coco_set), ("davis", davis_set)])
def test_other_sets_go_through_a_process_too(tmp_path, name, make):
    make(tmp_path)
    data = (Source(name=name, root=str(tmp_path)),)
    run = settings(tmp_path, data=data, batch=1, workers=1, packed=Packed(sides=(60, 60), **STILL))
    with closing(Stream(run).batches()) as batches:
        (found,) = photos(next(batches))
    assert found.name == f"{name}/a"
    assert np.array_equal(found.pixels, photo(40, 60))
    assert np.array_equal(np.argwhere(found.masks[0])[[0, -1]], [[10, 10], [29, 29]])
    assert found.masks.sum() == 400


# ---------------------------------------------------------------- loaded ahead


@pytest.mark.parametrize("form", [settings, canvases])
def test_the_same_bytes_for_any_number_of_workers(root, form, request):
    """From the start and from the middle of an epoch; with one of the forms the processes start as they do for anybody."""
    if form is canvases:
        request.getfixturevalue("quick_processes")
    want = [Stream(form(root)).batch(step) for step in range(9)]
    for count, first in ((0, 0), (1, 0), (2, 4)):
        with closing(Stream(form(root, workers=count)).batches(first)) as batches:
            for step in range(first, 9):
                assert_same(next(batches), want[step])
    assert multiprocessing.active_children() == []


@QUICK
@pytest.mark.parametrize("form", [settings, canvases])
def test_a_batch_is_put_together_while_the_one_before_is_in_use(root, form, monkeypatch):
    """By a thread, and with processes only."""
    made = []
    assemble = Stream._batch
    monkeypatch.setattr(Stream, "_batch", lambda *args: made.append(threading.current_thread()) or assemble(*args))
    with closing(Stream(form(root, workers=1)).batches()) as batches:
        next(batches)
        end = time.monotonic() + 30
        while len(made) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert threading.main_thread() not in made
    made.clear()
    with closing(Stream(form(root)).batches()) as batches:
        next(batches)
    assert made == [threading.main_thread()]


def own_processes(root, told):
    batches = Stream(settings(root, workers=2)).batches()
    next(batches)
    told.send([child.pid for child in multiprocessing.active_children()])
    signal.pause()


def test_processes_end_when_their_owner_is_killed(root):
    """No orphans: their pipes close."""
    here, there = multiprocessing.Pipe(duplex=False)
    owner = begun(own_processes, root, there)
    there.close()
    pids = here.recv()
    assert len(pids) == 2
    ends = [os.pidfd_open(pid) for pid in pids]
    owner.kill()
    owner.join()
    for end in ends:
        assert select.select([end], [], [], 30)[0], "a worker outlived its owner"
        os.close(end)


def faults(root, kind, count):
    """Kill or freeze a random worker at a random moment ``count`` times; seconds until the error, and its text."""
    rng, found = random.Random(0), []
    for _ in range(count):
        stream = Stream(settings(root, workers=2, batch=4, patience=5.0, seed=rng.randrange(1000)))
        with closing(stream.batches()) as batches:
            for _ in range(rng.randint(1, 6)):
                next(batches)
            victim = rng.choice(multiprocessing.active_children())
            time.sleep(rng.uniform(0, 0.02))  # anywhere in its work
            os.kill(victim.pid, kind)
            began = time.monotonic()
            with pytest.raises(WorkerError) as caught:
                deque(batches, maxlen=0)
            found.append((time.monotonic() - began, str(caught.value)))
        assert multiprocessing.active_children() == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [(signal.SIGKILL, 50), (signal.SIGSTOP, 10)])
def test_fifty_kills_and_ten_freezes(root, kind, count):
    found = faults(root, kind, count)
    assert all(seconds < 30 for seconds, _ in found), max(found)
    assert all("images/p" in text for _, text in found), [text for _, text in found if "images/p" not in text]


# ---------------------------------------------------------------- files that are wrong


@pytest.fixture
def damaged(root, tmp_path):
    """A copy of the set with one picture cut off."""
    for path in sorted(root.rglob("*.png")):
        copy = tmp_path / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    cut = tmp_path / "images" / "p4.png"
    cut.write_bytes(cut.read_bytes()[:500])
    return tmp_path


@QUICK
@pytest.mark.parametrize("count", [0, 1])
def test_a_damaged_picture_stops_the_run_and_is_named(damaged, count):
    stream = Stream(settings(damaged, workers=count))
    with pytest.raises(ValueError, match=r"images/p4\.png.*on_error=skip"):
        for _ in zip(range(3), stream.batches()):
            pass
    assert multiprocessing.active_children() == []


def test_damaged_pictures_are_left_out_counted_and_said(damaged, caplog):
    stream = Stream(settings(damaged, batch=7, on_error="skip"))
    with caplog.at_level(logging.WARNING, logger="hrsam"):
        for step in range(2):
            assert names(stream.batch(step)) == sorted(
                {f"{damaged.name}/p{i}" for i in range(7)} - {f"{damaged.name}/p4"}
            )
    assert stream.skipped == 2
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert all("p4.png" in line for line in said)
    assert "(2 so far)" in said[1]


def test_a_step_without_any_usable_picture(damaged):
    for path in (damaged / "images").iterdir():
        path.write_bytes(b"nothing")
    batch = Stream(settings(damaged, on_error="skip")).batch(0)
    assert batch.packs == ()
    with pytest.raises(ValueError, match="none of the 3 pictures of step 0"):
        Stream(canvases(damaged, on_error="skip")).batch(0)


def test_faults_of_the_index_are_told(damaged, caplog):
    (damaged / "masks" / "p0_0.png").unlink()
    with pytest.raises(ValueError, match=r"images/p0\.png has no mask.*1 such problems.*on_error=skip"):
        Stream(settings(damaged))
    with caplog.at_level(logging.WARNING, logger="hrsam"):
        assert len(Stream(settings(damaged, on_error="skip"))) == 6
    assert "p0.png has no mask" in caplog.text


def test_pixels_to_ignore_are_refused(tmp_path):
    save(tmp_path / "data_GT" / "a.png", photo(20, 20))
    save(tmp_path / "boundary_GT" / "a.png", np.pad(np.full((6, 6), 255, np.uint8), 7, constant_values=128))
    grabcut = (Source(name="grabcut", root=str(tmp_path)),)
    with pytest.raises(ValueError, match=r"boundary_GT/a\.png has pixels to ignore"):
        Stream(settings(tmp_path, data=grabcut, batch=1)).batch(0)


def test_wrong_settings_are_refused(root):
    with pytest.raises(ValueError, match="got 3 pictures a step for 4 devices; give at least 4"):
        Stream(settings(root), world=4)
    with pytest.raises(ValueError, match="give a multiple of 2"):
        Stream(canvases(root), world=2)
    with pytest.raises(ValueError, match="either packed or canvases"):
        settings(root, canvases=Canvases())
    with pytest.raises(ValueError, match="either packed or canvases"):
        settings(root, packed=None)
    with pytest.raises(ValueError, match="smaller one first"):
        Packed(sides=(64, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        Canvases(sides=(60,))
    with pytest.raises(ValueError, match="no picture"):
        Stream(settings(root, data=()))
    with pytest.raises(ValueError, match="got data set 'pear'"):
        Stream(settings(root, data=(Source(name="pear", root=str(root)),)))
