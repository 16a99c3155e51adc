"""Rounds of clicks on packed pictures: a pack in one batch against one picture after the other."""

import functools
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hrsam.clicks import Draws
from hrsam.data.packing import Counts, loss_total, loss_weights
from hrsam.models.model import Embedding
from hrsam.rollout import ClickRollout, Rounds, _enlarge, _loose_box
from tests.test_packing import double_model, largest_difference, pictures


class Plan(random.Random):
    """Begins with the number that decides how a step starts."""

    def __init__(self, kind):
        super().__init__(1)
        self.kind = kind

    def random(self):
        kind, self.kind = self.kind, None
        return super().random() if kind is None else kind


STARTS = {"box": 0.0, "random clicks": 0.2, "click": 0.9}
EACH_START = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
# (sizes, objects): the first, third and last have one grid, padded differently; in the other no two have
SHARED = ((64, 96), (37, 50), (64, 90), (20, 9), (64, 96)), (2, 1, 3, 1, 2)
DIFFERENT = ((96, 32), (32, 112), (50, 77), (17, 16), (64, 64)), (1, 3, 1, 2, 1)


def discs(size, count, seed):
    rng = random.Random(seed)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    centres = [
        (rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0.2, 0.5) * min(size)) for _ in range(count)
    ]
    return torch.stack([(y - a) ** 2 + (x - b) ** 2 <= r**2 for a, b, r in centres])


def clicked_pack(pack):
    sizes, objects = pack
    truths = [discs(size, count, seed) for seed, (size, count) in enumerate(zip(sizes, objects))]
    counts = [Counts(k, math.ceil(h / 16) * math.ceil(w / 16), h * w) for k, (h, w) in zip(objects, sizes)]
    return pictures(sizes, seed=5), truths, counts


def fresh_rollout(dtype=torch.float64):
    model = double_model(drop_path=0.3)
    nn.init.normal_(model.prompt_encoder.no_mask_embed.weight)
    return ClickRollout(model.to(dtype).train(), Rounds(trained=2, another=0.5, most_silent=1))


def play(rollout, indices, weights, start, pack=SHARED):
    images, truths, _ = clicked_pack(pack)
    dtype = rollout.model.mask_decoder.iou_token.weight.dtype
    return rollout.packed(
        [images[i].to(dtype) for i in indices],
        [truths[i] for i in indices],
        [weights[i] for i in indices],
        [torch.Generator().manual_seed(40 + i) for i in indices],
        Plan(start),
    )


def prompts_of(rollout, monkeypatch):
    """The prompts of each call of the decoder from now on: points and labels, and the box where there is one."""
    calls, decode = [], rollout.model.decode

    def watched(embedding, points, labels, box, previous, masks):
        calls.append((points, labels) if box is None else (points, labels, box))
        return decode(embedding, points, labels, box, previous, masks)

    monkeypatch.setattr(rollout.model, "decode", watched)
    return calls


def each_alone(start, pack, dtype=torch.float64):
    """Loss of each picture by itself with a weight of 1, IoU of each round over all objects, gradients (pictures, all)."""
    rollout, objects = fresh_rollout(dtype), pack[1]
    losses, gradients, reached = [], [], 0.0
    for index, count in enumerate(objects):
        rollout.zero_grad()
        one, iou = play(rollout, [index], [1.0] * len(objects), start, pack)
        one.backward()
        losses.append(float(one.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in rollout.parameters()]))
        reached = reached + iou * count / sum(objects)
    return losses, reached, torch.stack(gradients)


@pytest.fixture(scope="module")
def alone():
    """:func:`each_alone`, asked once for each start and pack: their tests follow each other."""
    return functools.lru_cache(1)(each_alone)


def one_after_the_other(weights, losses, reached, gradients):
    """Loss, IoU of each round over all objects, and a rollout with the gradients: sums over the pictures with these weights."""
    rollout = fresh_rollout(gradients.dtype)
    parameters = list(rollout.parameters())
    added = (torch.tensor(weights, dtype=gradients.dtype) @ gradients).split([p.numel() for p in parameters])
    for p, gradient in zip(parameters, added, strict=True):
        p.grad = gradient.view_as(p)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)), reached, rollout


@pytest.mark.parametrize(
    ("pack", "reduction"),
    [(SHARED, "image"), (SHARED, "object"), (SHARED, "pixel"), (DIFFERENT, "image"), (DIFFERENT, "pixel")],
)
@EACH_START
def test_packed_rounds_equal_one_picture_after_the_other(start, pack, reduction, alone):
    _, _, counts = clicked_pack(pack)
    weights = loss_weights(reduction, counts, loss_total(reduction, counts))
    packed = fresh_rollout()
    loss, ious = play(packed, range(5), weights, start, pack)
    loss.backward()
    total, reached, added = one_after_the_other(weights, *alone(start, pack))
    assert loss.dtype == torch.float64
    assert float(loss.detach()) == pytest.approx(total, abs=1e-10)
    assert largest_difference(added, packed) <= 1e-9
    torch.testing.assert_close(ious, reached, atol=1e-6, rtol=0)
    assert len(ious) == 3


@EACH_START
def test_packed_rounds_in_single_precision(start):
    weights = [0.2] * 5
    packed = fresh_rollout(torch.float32)
    loss, ious = play(packed, range(5), weights, start, DIFFERENT)
    loss.backward()
    total, reached, added = one_after_the_other(weights, *each_alone(start, DIFFERENT, torch.float32))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(total, abs=2e-6)
    torch.testing.assert_close(ious, reached, atol=1e-4, rtol=0)
    whole, parts = (torch.cat([p.grad.flatten() for p in r.model.parameters()]) for r in (packed, added))
    assert whole.norm() > 1e-3
    assert (whole - parts).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("pack", [SHARED, DIFFERENT])
@EACH_START
def test_a_picture_gets_its_prompts_whatever_is_beside_it(start, pack, monkeypatch):
    """Clicks and boxes to the bit, alone, among all, and among others in another order."""
    rollout, weights = fresh_rollout().eval(), [1.0] * 5
    with monkeypatch.context() as patch:
        calls, found = prompts_of(rollout, patch), {}
        for indices in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4], [3, 4, 1]):
            calls.clear()
            with torch.no_grad():
                play(rollout, indices, weights, start, pack)
            split = [[t.split([pack[1][i] for i in indices]) for t in call] for call in calls]
            for place, index in enumerate(indices):
                found.setdefault(index, []).append([each[place] for call in split for each in call])
    for index, (alone, *others) in found.items():
        assert len(others) == (2 if index in (1, 3, 4) else 1)
        assert len(alone) >= 6
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_canvases_are_a_pack_of_squares():
    """Without padding, and with the anchor of canvases, both forms are one function: the mean over objects."""
    rollout = fresh_rollout().eval()
    size = (128, 128)  # the anchor is 64 in both forms
    pixels, truth = pictures([size])[0], discs(size, 2, 7)
    canvas, _ = rollout(pixels.unsqueeze(0), truth.unsqueeze(0), torch.Generator().manual_seed(3), Plan(0.9))
    packed, _ = rollout.packed([pixels], [truth], [0.5], [torch.Generator().manual_seed(3)], Plan(0.9))
    assert float(packed.detach()) == pytest.approx(float(canvas.detach()), abs=1e-10)


def test_padding_is_neither_clicked_nor_counted(monkeypatch):
    """Whatever the model says of the padding of a picture, loss and IoU are those of the picture, and no click falls there."""
    height, width = 37, 50  # 10 x 13 cells of a 12 x 16 map
    rollout = fresh_rollout().eval()
    decode, clicks = rollout.model.decode, []

    def silenced(value):
        """The picture's own logits do not depend on what is fed back, those of the padding are ``value``."""

        def answer(embedding, points, labels, box, previous, masks):
            clicks.append(points)
            out = decode(embedding, points, labels, box, None, masks)
            rows, cols = (torch.arange(n) for n in out.logits.shape[2:])
            # cells whose values reach no pixel of the picture when they are enlarged
            far = (rows.unsqueeze(1) > -(-height // 4)) | (cols > -(-width // 4))
            return type(out)(out.logits.masked_fill(far, value), out.iou)

        return answer

    found = []
    for value in (-50.0, 0.0, 50.0):
        with monkeypatch.context() as patch:
            patch.setattr(rollout.model, "decode", silenced(value))
            loss, ious = play(rollout, [1], [1.0] * 5, STARTS["random clicks"])
            found.append((float(loss.detach()), ious.tolist()))
    assert found[0] == found[1] == found[2]
    assert (
        max(points[..., 0].max() for points in clicks) < width + 2
    )  # the centre of a cell begun may lie beyond the edge
    assert max(points[..., 1].max() for points in clicks) < height + 2


@EACH_START
def test_what_is_beyond_a_pictures_own_grid_has_no_influence(start, monkeypatch):
    """Whatever is answered there, and fed back: the same loss, IoU and gradient, and no click or box beyond the picture."""
    sizes, objects = DIFFERENT
    grids = torch.tensor([[-(-side // 16) for side in size] for size, n in zip(sizes, objects) for _ in range(n)])
    ends = torch.tensor([size[::-1] for size, n in zip(sizes, objects) for _ in range(n)]).unsqueeze(1)  # x, y
    found = []
    for value in (None, -50.0, 50.0, 1e4):
        rollout = fresh_rollout()
        decode = rollout.model.decode

        def answer(embedding, points, labels, box, previous, masks, decode=decode, value=value):
            assert torch.equal(embedding.grids, grids)
            assert ((points >= 0) & (points < 4 * -(-ends // 4))).all()
            assert box is None or ((box >= 0) & (box.view(-1, 2, 2) <= 4 * -(-ends // 4) - 1).flatten(1)).all()
            out = decode(embedding, points, labels, box, previous, masks)
            rows, cols = (torch.arange(n) for n in out.logits.shape[2:])
            beyond = (rows.view(-1, 1) >= 4 * grids[:, 0].view(-1, 1, 1)) | (cols >= 4 * grids[:, 1].view(-1, 1, 1))
            assert beyond.flatten(1).any(1).all()  # each is padded somewhere
            logits = out.logits if value is None else out.logits.masked_fill(beyond.unsqueeze(1), value)
            return type(out)(logits, out.iou)

        with monkeypatch.context() as patch:
            patch.setattr(rollout.model, "decode", answer)
            loss, ious = play(rollout, range(5), [0.2] * 5, start, DIFFERENT)
        loss.backward()
        found.append((loss.detach(), ious, *(p.grad for p in rollout.model.parameters())))
    assert float(found[0][0]) > 0.5
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_cells_of_padding_are_not_read():
    """The decoder on maps with nonsense beyond each picture's grid, against each picture alone."""
    model, grids = double_model(), [(4, 2), (2, 5), (1, 1)]
    g = torch.Generator().manual_seed(2)
    maps = [torch.randn(1, 256, *grid, generator=g, dtype=torch.float64) for grid in grids]
    earlier = [torch.randn(1, 1, 4 * h, 4 * w, generator=g, dtype=torch.float64) for h, w in grids]
    points = torch.tensor([[[3.0, 5.0], [17.0, 30.0]], [[60.0, 9.0], [1.0, 2.0]], [[8.0, 8.0], [0.0, 15.0]]])
    labels, boxes = torch.tensor([[1, 0]] * 3), torch.tensor([[1.0, 2.0, 20.0, 40.0]] * 3)

    def filled(tensor, height, width):
        out = 100 * torch.randn(1, tensor.shape[1], height, width, generator=g, dtype=torch.float64)
        out[..., : tensor.shape[2], : tensor.shape[3]] = tensor
        return out

    codes = [model.dense_positions(grid) for grid in grids]
    features, positions = (torch.cat([filled(t, 4, 5) for t in each]) for each in (maps, codes))
    together = Embedding(features, positions, torch.tensor(grids))
    previous = torch.cat([filled(t, 16, 20) for t in earlier])
    with torch.no_grad():
        for box, fed in ((None, None), (None, previous), (boxes, None)):
            out = model.decode(together, points, labels, box, fed, masks=(0, 1, 2, 3))
            for i, (h, w) in enumerate(grids):
                before = None if fed is None else earlier[i]
                one, alone = slice(i, i + 1), Embedding(maps[i], codes[i])
                own = None if box is None else box[one]
                single = model.decode(alone, points[one], labels[one], own, before, (0, 1, 2, 3))
                torch.testing.assert_close(out.logits[one, :, : 4 * h, : 4 * w], single.logits, atol=1e-10, rtol=0)
                torch.testing.assert_close(out.iou[one], single.iou, atol=1e-10, rtol=0)


def test_padded_pictures_that_are_refused():
    model = double_model().float()
    embedding = Embedding(torch.zeros(2, 256, 2, 3), model.dense_positions((2, 3)), torch.tensor([[2, 3], [1, 1]]))
    points, labels = torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.int64)
    model.decode(embedding, points, labels)
    with pytest.raises(ValueError, match=r"a prompt each; got 2 pictures, grids \(2, 2\) and 1 prompts"):
        model.decode(embedding, points[:1], labels[:1])
    fast = model.optimize(dtype=torch.float32, compile=False, graphs=False)
    with pytest.raises(ValueError, match="takes no pictures padded to one grid; decode each embedding by itself"):
        fast.decode(embedding, points, labels)


def test_enlarging_reads_the_own_cells_only():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 8, 12, generator=g)
    sizes = [(8, 12), (4, 12), (8, 1)]
    full = _enlarge(logits, 32, 48, torch.tensor(sizes))
    whole = F.interpolate(logits.unsqueeze(1), scale_factor=4, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(_enlarge(logits, 32, 48, None), whole, atol=1e-6, rtol=0)
    for i, (h, w) in enumerate(sizes):
        own = logits[i : i + 1, :h, :w].unsqueeze(1)
        want = F.interpolate(own, scale_factor=4, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(full[i, : 4 * h, : 4 * w], want, atol=1e-6, rtol=0)


def test_boxes_of_padded_pictures_are_their_own():
    """One object touches the far corner of its picture; one picture has none, and a box around all of it."""
    sizes, real = [(5, 9), (7, 4), (3, 3)], torch.zeros(3, 7, 9, dtype=torch.bool)
    small = torch.zeros_like(real)
    small[0, 3:5, 6:9] = small[1, 1:3, :2] = True
    for i, (h, w) in enumerate(sizes):
        real[i, :h, :w] = True
    seeds = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    together = _loose_box(small, real, 0.3, Draws(seeds[0], (1, 1, 1)))
    for i, (h, w) in enumerate(sizes):
        alone = _loose_box(small[i : i + 1, :h, :w], None, 0.3, Draws(seeds[1][i : i + 1], (1,)))
        assert torch.equal(together[i : i + 1], alone)
    tight = _loose_box(small, real, 0.0, Draws(seeds[0], (1, 1, 1)))
    assert tight.tolist() == [[23.5, 11.5, 35.0, 19.0], [0.0, 3.5, 7.5, 11.5], [0.0, 0.0, 11.0, 11.0]]


class Operations(TorchDispatchMode):
    """Counts what is run, the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        if function is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.names["index by a mask"] += 1
        return function(*args, **(kwargs or {}))


@EACH_START
def test_pictures_of_different_sizes_are_played_at_once(start, monkeypatch):
    """Eight sizes take hardly more operations than one, and none that fetches a number."""
    rollout = fresh_rollout()

    def game(sizes):
        maps = [torch.randn(256, -(-h // 16), -(-w // 16), dtype=torch.float64, requires_grad=True) for h, w in sizes]
        images, truths = pictures(sizes), [discs(size, 1, 3) for size in sizes]
        generators = [torch.Generator().manual_seed(i) for i in range(len(sizes))]
        with monkeypatch.context() as patch, Operations() as operations:
            patch.setattr(rollout.model.encoder, "forward_packed", lambda images, generators: [m * 1 for m in maps])
            loss, _ = rollout.packed(images, truths, [1.0] * len(sizes), generators, Plan(start))
            loss.backward()
        assert all(m.grad.abs().sum() > 0 for m in maps)
        return operations.names

    same = game([(40, 64)] * 8)
    different = game([(40 + 3 * i, 64 - 5 * i) for i in range(8)])
    assert sum(same.values()) > 1000
    assert sum(different.values()) <= 1.2 * sum(same.values())
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "index by a mask")
    assert not {name for name in different if any(word in name for word in waiting)}


def test_wrong_rounds_are_refused():
    rollout = fresh_rollout()
    images, truths, _ = clicked_pack(SHARED)
    generators = [torch.Generator()] * 5
    with pytest.raises(ValueError, match="got 0 pictures"):
        rollout.packed([], [], [], [], Plan(0.9))
    with pytest.raises(ValueError, match="5 pictures, 5 truths, 1 weights"):
        rollout.packed(images, truths, [1.0], generators, Plan(0.9))
    with pytest.raises(ValueError, match=r"bool \(K, 64, 96\) with at least one object; got torch.bool \(2, 64, 95\)"):
        rollout.packed(images, [truths[0][..., 1:], *truths[1:]], [1.0] * 5, generators, Plan(0.9))
