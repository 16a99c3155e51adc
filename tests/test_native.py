"""Refining, with a model that knows the truth: thin things come back, no seams, and no word against the mask is believed."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrsam import native
from hrsam.clicks import Click
from hrsam.cutting import Cutting
from hrsam.frame import Frame
from hrsam.mask import Mask
from hrsam.metrics import iou
from hrsam.native import RefinedRound, plan
from hrsam.pyramid import InMemory
from hrsam.session import History, Prediction, Round
from tests.builders import photo, small_model

SIDE = 128


def disc(height, width, x0=150.0, y0=160.0, radius=70.0, slits=()):
    """Signed distance to a disc, positive inside, (H, W) float32; ``slits``: columns at which 10 pixels are cut out."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = radius - np.hypot(x - x0, y - y0)
    for slit in slits:
        inside = np.minimum(inside, np.abs(x - slit - 0.5) - 5)
    return inside.astype(np.float32)


class Knowing:
    """Stands for encoder and decoder: answers for a region from ``field`` (H, W), logits of the whole picture."""

    def __init__(self, field, monkeypatch, side=SIDE):
        self.field, self.side = field, side
        self.asked, self.wrong = [], {}
        monkeypatch.setattr(native, "predict_masks", self.predict)

    def encode(self, region):
        return SimpleNamespace(frame=Frame(region.height, region.width, self.side), region=region)

    def predict(self, model, picture, clicks, box, previous):
        region = picture.region
        self.asked.append((region, tuple(clicks), previous))
        values = self.field[region.y0 : region.y1, region.x0 : region.x1]
        answer = self.wrong.get(len(self.asked), lambda logits: logits)
        return [Prediction(picture.frame, picture.frame.logits_to_model(answer(values)), 0.75, 0.25)]


ON_IT = (Click(150, 160),)


def coarse(field, clicks=ON_IT, side=SIDE):
    """What the whole picture's round would be: the truth at the model's side."""
    frame = Frame(*field.shape, side)
    return frame, History((Round(tuple(clicks), None, Prediction(frame, frame.logits_to_model(field), 0.5, 0.1)),))


# ---------------------------------------------------------------- where is looked


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(20, 30_000), st.integers(20, 30_000), st.sampled_from([64, 256, 1024]))
def test_regions_cover_the_object_and_overlap(data, height, width, side):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    regions = plan((x0, y0, x1, y1), height, width, side)
    assert 1 <= len(regions) <= native.MOST_REGIONS
    assert len(set(regions)) == len(regions)
    for region in regions:
        assert 0 <= region.x0 < region.x1 <= width
        assert 0 <= region.y0 < region.y1 <= height
        assert max(region.height, region.width) >= min(side / native.ZOOM, max(height, width))
    # somebody speaks with a full voice wherever the object is
    for x, y in [(x0, y0), (x1 - 1, y1 - 1), ((x0 + x1) // 2, (y0 + y1) // 2), (x0 + (x1 - x0) // 3, y1 - 1)]:
        at = range(y, y + 1), range(x, x + 1)
        voices = sum(
            float(r.weights(*at, height, width)[0, 0]) for r in regions if r.x0 <= x < r.x1 and r.y0 <= y < r.y1
        )
        assert voices >= 0.999


def test_a_small_object_gets_one_square_region_around_it():
    (region,) = plan((500, 400, 900, 500), 1000, 2000, 1024)
    margin = round(400 * native.MARGIN)
    assert (region.x0, region.x1) == (500 - margin, 900 + margin)
    assert (region.y0, region.y1) == (450 - 200 - margin, 450 + 200 + margin)
    (region,) = plan((0, 0, 700, 500), 1000, 2000, 1024)
    assert (region.x0, region.y0, region.x1, region.y1) == (0, 0, 700 + round(700 * native.MARGIN), 805)
    (region,) = plan((500, 400, 501, 401), 1000, 2000, 1024)
    assert (region.width, region.height) == (1024 / native.ZOOM, 1024 / native.ZOOM)


def test_a_large_object_gets_a_grid_at_native_resolution():
    regions = plan((1000, 1000, 2500, 1900), 5000, 5000, 1024)
    assert {(r.width, r.height) for r in regions} == {(1024, 1024)}
    columns, rows = sorted({r.x0 for r in regions}), sorted({r.y0 for r in regions})
    assert len(columns) * len(rows) == len(regions)
    assert all(b - a <= 768 for places in (columns, rows) for a, b in pairwise(places))
    assert max(r.width for r in plan((0, 0, 30_000, 30_000), 30_000, 30_000, 1024)) > 7500  # else too many


def test_weights_fade_at_the_sides_but_not_at_the_edge_of_the_picture():
    region = native.Region(0, 10, 20, 30, ramp=4)
    weights = region.weights(range(10, 30), range(0, 20), 100, 100)
    assert weights[10, 0] == 1  # the picture's own edge
    np.testing.assert_allclose(weights[10, -4:], [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(weights[:4, 10], [0.125, 0.375, 0.625, 0.875])
    assert weights[0, 19] == 0.125


# ---------------------------------------------------------------- what becomes of the mask


@pytest.mark.parametrize("start", ["logits", "mask"])
def test_thin_structures_come_back(monkeypatch, start):
    slits = range(70, 330, 43)
    field = disc(400, 700, 200, 200, 150, slits)
    truth, knowing = field > 0, Knowing(field, monkeypatch)
    frame, history = coarse(field)
    if start == "mask":
        history = history.start_from(frame, history.last.runs)
    before = history.last.mask
    after = native.refine(None, frame, history, SIDE, knowing.encode)
    assert len(knowing.asked) > 4
    assert after.rounds[:-1] == history.rounds
    cut = disc(400, 700, 200, 200, 140) > 0
    cut &= ~truth
    assert (~before & cut).sum() < 0.2 * cut.sum()
    assert (~after.last.mask & cut).sum() > 0.9 * cut.sum()
    assert iou(after.last.mask, truth) > 0.97 > 0.8 > iou(before, truth)
    assert (after.last.clicks, after.last.prediction.iou) == (history.last.clicks, 0.75)


def test_an_object_over_many_regions_is_one_mask_without_seams(monkeypatch):
    field = disc(500, 600, 300, 250, 230)
    frame, history = coarse(field)
    knowing = Knowing(field, monkeypatch)
    refined = native.refine(None, frame, history, SIDE, knowing.encode).last
    assert len(refined.patches) >= 9
    wrong = refined.mask != (field > 0)
    assert np.abs(field[wrong]).max(initial=0) < 1  # nothing but the outline's own pixels
    assert refined.runs.area == refined.mask.sum()


def test_neighbours_that_differ_are_mixed_without_a_step(monkeypatch):
    """One region says the outline lies 6 pixels further out: the outline bends, it does not jump."""
    y = np.mgrid[:512, :512][0].astype(np.float32)
    field = 256 - y  # everything above the middle
    frame, history = coarse(field, side=64)
    knowing = Knowing(field, monkeypatch, side=128)
    monkeypatch.setattr(native, "plan", lambda *_: [native.Region(x, 200, x + 128, 312, 16) for x in range(0, 400, 96)])
    knowing.wrong = {2: lambda logits: logits + 6}
    refined = native.refine(None, frame, history, 128, knowing.encode).last
    height = refined.mask.sum(0).astype(int)
    assert (height[:96].max(), height[150:190].min()) == (256, 262)
    assert np.abs(np.diff(height[:480])).max() <= 1


def test_outside_the_regions_nothing_changes(monkeypatch):
    field = disc(400, 700)
    frame, history = coarse(field)
    far = field.copy()
    far[350:, 600:] = 5  # a second part, far from the first
    _, other = coarse(far)
    monkeypatch.setattr(native, "plan", lambda *_: [native.Region(60, 70, 240, 250, 10)])
    refined = native.refine(None, frame, other, SIDE, Knowing(field, monkeypatch).encode).last
    outside = np.ones_like(field, bool)
    outside[70:250, 60:240] = False
    np.testing.assert_array_equal(refined.mask[outside], other.last.mask[outside])
    assert (refined.mask[~outside] != history.last.mask[~outside]).any()


def test_regions_without_an_outline_are_not_looked_at(monkeypatch):
    field = disc(800, 800, 400, 400, 390)
    frame, history = coarse(field)
    knowing = Knowing(field, monkeypatch)
    native.refine(None, frame, history, SIDE, knowing.encode)
    regions = plan(history.last.runs.bbox, 800, 800, SIDE)
    assert 0 < len(knowing.asked) < len(regions)


# ---------------------------------------------------------------- what is not believed


def test_a_region_that_contradicts_the_mask_is_dropped(monkeypatch):
    field = disc(500, 600, 300, 250, 230)
    frame, history = coarse(field)
    knowing = Knowing(field, monkeypatch)
    whole = native.refine(None, frame, history, SIDE, knowing.encode).last
    knowing.asked.clear()
    knowing.wrong = {3: lambda logits: -logits}
    refined = native.refine(None, frame, history, SIDE, knowing.encode).last
    assert [p.region for p in refined.patches] == [p.region for i, p in enumerate(whole.patches) if i != 2]
    alone = np.ones_like(field, bool)
    for patch in refined.patches:
        alone[patch.region.y0 : patch.region.y1, patch.region.x0 : patch.region.x1] = False
    assert (whole.mask[alone] != history.last.mask[alone]).any()
    np.testing.assert_array_equal(refined.mask[alone], history.last.mask[alone])
    assert iou(refined.mask, field > 0) > 0.98


def test_when_all_contradict_nothing_is_changed(monkeypatch):
    field = disc(400, 700)
    frame, history = coarse(field)
    with pytest.raises(ValueError, match="contradicts the mask everywhere, so it stays as it is"):
        native.refine(None, frame, history, SIDE, Knowing(-field, monkeypatch).encode)


def test_a_region_that_breaks_a_click_is_not_believed(monkeypatch):
    field = disc(400, 700)
    wider = Knowing(field + 25, monkeypatch, side=512)  # the IoU with the mask is still above a half
    frame, history = coarse(field, (*ON_IT, Click(150, 160 - 90, False)))
    with pytest.raises(ValueError, match="contradicts"):
        native.refine(None, frame, history, 512, wider.encode)
    frame, history = coarse(field)
    assert native.refine(None, frame, history, 512, wider.encode).last.runs.area > 1.5 * history.last.runs.area


def test_what_cannot_be_refined(monkeypatch):
    field = disc(400, 700)
    knowing = Knowing(field, monkeypatch)
    frame, history = coarse(field)
    for nothing in (History(), coarse(-np.ones_like(field))[1]):
        with pytest.raises(ValueError, match="there is no mask to refine"):
            native.refine(None, frame, nothing, SIDE, knowing.encode)
    small = disc(60, 60, 30, 30, 28)
    frame, history = coarse(small)
    with pytest.raises(ValueError, match="seen as fine as can be"):
        native.refine(None, frame, history, SIDE, Knowing(small, monkeypatch).encode)


# ---------------------------------------------------------------- what a region is asked


def test_a_region_gets_its_clicks_or_one_of_its_own(monkeypatch):
    field = disc(500, 600, 300, 250, 230)
    clicks = (Click(100, 250), Click(20, 20, False), Click(310, 260))
    frame, history = coarse(field, clicks)
    knowing = Knowing(field, monkeypatch)
    native.refine(None, frame, history, SIDE, knowing.encode)
    for region, asked, previous in knowing.asked:
        inside = [c for c in clicks if region.holds(c)]
        own = [Click(c.x + region.x0, c.y + region.y0, c.positive) for c in asked]
        assert own[len(own) - len(inside) :] == inside
        assert any(c.positive for c in own)
        for c in own:
            assert region.holds(c)
            assert c in inside or field[round(c.y), round(c.x)] > 0
        want = Frame(region.height, region.width, SIDE).logits_to_model(
            field[region.y0 : region.y1, region.x0 : region.x1]
        )
        assert torch.corrcoef(torch.stack([previous.ravel(), want.ravel()]))[0, 1] > 0.9


def test_a_later_click_is_answered_by_its_region(monkeypatch):
    field = disc(500, 600, 300, 250, 230)
    frame, history = coarse(field)
    knowing = Knowing(field, monkeypatch)
    history = native.refine(None, frame, history, SIDE, knowing.encode)
    knowing.asked.clear()
    knowing.wrong = {1: lambda logits: logits + 3}
    new = Click(80, 240)
    later = native.click(None, frame, history, new, knowing.encode)
    ((region, asked, previous),) = knowing.asked
    assert Click(new.x - region.x0, new.y - region.y0) in asked
    old = next(p for p in history.last.patches if p.region == region)
    assert previous is old.prediction.low_res
    assert later.last.clicks == (*history.last.clicks, new)
    changed = np.argwhere(later.last.mask != history.last.mask)
    assert len(changed)
    assert (changed.min(0) >= (region.y0, region.x0)).all()
    assert (changed.max(0) < (region.y1, region.x1)).all()
    assert isinstance(later.last, RefinedRound)
    assert later.undo().last is history.last
    again = native.refine(None, frame, later, SIDE, knowing.encode)  # from the refined mask
    assert again.last.base is later.last


def test_a_click_elsewhere_goes_to_the_whole_picture(monkeypatch):
    field = disc(400, 700)
    frame, history = coarse(field)
    assert native.click(None, frame, history, Click(150, 160), None) is None
    refined = native.refine(None, frame, history, SIDE, Knowing(field, monkeypatch).encode)
    assert native.click(None, frame, refined, Click(650, 390), None) is None
    want = frame.mask_to_logits(refined.last.mask, 8.0)
    assert torch.equal(refined.last.prediction.low_res, want)  # from which that goes on


# ---------------------------------------------------------------- with a real model


@pytest.fixture
def played(monkeypatch):
    """A cutting with a refined object and clicks after it; a random model's regions do not agree, so all are believed."""
    monkeypatch.setattr(native, "_agrees", lambda *_: True)
    model = small_model()

    def play(commands):
        cutting = Cutting(model, InMemory(photo(100, 150)), 64)
        for command in commands:
            cutting.apply(command)
        return cutting

    return play


COMMANDS = [
    {"do": "click", "object": 1, "x": 50, "y": 60},
    {"do": "refine", "object": 1},
    {"do": "click", "object": 1, "x": 90, "y": 60, "positive": False},
    {"do": "box", "object": 1, "x0": 10, "y0": 10, "x1": 100, "y1": 90},
    {"do": "undo", "object": 1},
    {"do": "click", "object": 1, "x": 10, "y": 75},
]


def test_refining_is_a_round_like_others_and_can_be_played_again(played):
    cutting, again = played(COMMANDS), played(COMMANDS)
    assert [type(r).__name__ for r in cutting.objects[1].history.rounds] == ["Round"] + 3 * ["RefinedRound"]
    masks = [r.runs.rle() for r in cutting.objects[1].history.rounds]
    assert masks == [r.runs.rle() for r in again.objects[1].history.rounds]
    assert len({mask["counts"] for mask in masks}) == 4
    assert not math.isnan(cutting.objects[1].iou)
    for command in ("undo", "undo", "undo", "redo", "redo", "redo"):
        cutting.apply({"do": command, "object": 1})
    assert cutting.objects[1].mask.rle() == masks[-1]


def test_dropped_regions_are_encoded_again_and_the_same(played, monkeypatch):
    want = played(COMMANDS).objects[1].mask.rle()
    cutting = played(COMMANDS[:2])
    assert 0 < len(cutting._regions) <= native.MOST_REGIONS
    for command in COMMANDS[2:]:
        cutting.picture = None
        assert not cutting._regions
        cutting.apply(command)
    assert cutting.objects[1].mask.rle() == want


def test_regions_are_encoded_once(played, monkeypatch):
    cutting = played(COMMANDS[:2])
    monkeypatch.setattr("hrsam.cutting.encode_picture", None)  # would fail
    cutting.apply(COMMANDS[2])


def test_a_mask_of_a_mask(monkeypatch):
    """Blending into a given mask leaves it where no region speaks."""
    field = disc(400, 700)
    frame = Frame(400, 700, SIDE)
    given = Mask.of(field > -3)
    history = History().start_from(frame, given)
    refined = native.refine(None, frame, history, SIDE, Knowing(field, monkeypatch).encode).last
    assert iou(refined.mask, field > 0) > 0.99
