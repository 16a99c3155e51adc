"""The click loop, and what is said about its results."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from hrsam.clicks import Click, next_click
from hrsam.data.sample import Sample
from hrsam.evaluation import PROTOCOLS, Protocol, play, seeded, summary
from hrsam.metrics import iou
from hrsam.segmenters import ModelSegmenter
from hrsam.session import Session
from hrsam.traces import Trace, mask_hash
from tests.builders import photo, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def sample():
    mask = np.zeros((60, 80), bool)
    mask[15:30, 26:] = True
    return Sample(photo(60, 80), mask, "set/block", "set")


class Scripted:
    """Answers with masks written down before."""

    def __init__(self, *masks):
        self.masks, self.asked = masks, []

    def start(self, pixels):
        self.asked = []

    def click(self, clicks):
        self.asked.append(clicks)
        return self.masks[min(len(self.asked), len(self.masks)) - 1]


def rows(*ious):
    return [
        Trace(str(i), "g", (1, 1), 1, (None,) * len(row), tuple(row), ("",) * len(row)) for i, row in enumerate(ious)
    ]


def rectangle(shape, top, left, bottom, right):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def brute_force_click(truth, mask, clicks, rule):
    """The simulated user from its definition: every distance by comparison with every other pixel."""
    clicked = {(int(c.y), int(c.x)) for c in clicks}
    best = {}
    for positive, wrong in ((True, truth & ~mask), (False, mask & ~truth)):
        wrong = np.pad(wrong, 1)
        if rule != "ritm":
            for y, x in clicked:
                wrong[y + 1, x + 1] = False
        outside = np.argwhere(~wrong)
        deepest = (0, None)
        for y, x in np.argwhere(wrong):
            if rule == "ritm" and (y - 1, x - 1) in clicked:
                continue
            squared = int(((outside - (y, x)) ** 2).sum(1).min())
            if squared > deepest[0]:
                deepest = squared, (x - 1, y - 1)
        best[positive] = deepest
    positive = best[True][0] > best[False][0]
    squared, place = best[positive]
    if squared == 0:
        return Click(0, 0, False) if rule == "ritm" else None
    return Click(*place, positive)


@pytest.mark.parametrize("name", ["frozen", "ritm"])
def test_the_simulated_user_is_the_definition(name):
    generator = np.random.default_rng(3)
    shape = (17, 23)
    truth = rectangle(shape, 3, 4, 14, 17) | rectangle(shape, 0, 19, 6, 23)
    masks = [rectangle(shape, *generator.integers(0, 9, 2), *generator.integers(9, 23, 2)) for _ in range(12)]
    trace = play(Scripted(*masks), Sample(photo(*shape), truth, "a", "g"), replace(PROTOCOLS[name], clicks=12))
    made, mask = [], np.zeros(shape, bool)
    for step, answer in enumerate(masks):
        expected = brute_force_click(truth, mask, made, PROTOCOLS[name].rule)
        assert trace.click_at(step) == expected
        made.append(expected)
        mask = answer
        assert trace.ious[step] == (mask & truth).sum() / (mask | truth).sum()
        assert trace.masks[step] == mask_hash(mask)


def test_frozen_by_hand():
    """A 5 x 7 block in a 9 x 11 picture, answered with its left part and one column too many at the top."""
    shape = (9, 11)
    truth = rectangle(shape, 2, 2, 7, 9)
    answer = rectangle(shape, 2, 2, 7, 6)
    trace = play(Scripted(answer, truth), Sample(photo(*shape), truth, "a", "g"), Protocol(clicks=4))
    # Depth 3 is reached by (4, 4), (5, 4) and (6, 4): the first in scan order; then 5 x 3 are missing, depth 2
    # at (7, 3), (7, 4) and (7, 5).
    assert trace.clicks == ((4, 4, 1), (7, 3, 1), None, None)
    assert trace.ious == (20 / 35, 1.0, 1.0, 1.0)


def test_rules_differ_where_they_should():
    shape = (9, 11)
    truth = rectangle(shape, 2, 2, 7, 9)
    empty = np.zeros(shape, bool)
    still = {
        name: play(Scripted(empty), Sample(photo(*shape), truth, "a", "g"), replace(PROTOCOLS[name], clicks=2))
        for name in ("frozen", "ritm")
    }
    # Nothing changed: ritm clicks the neighbour, frozen two away from the hole that the first click made.
    assert still["ritm"].clicks == ((4, 4, 1), (5, 4, 1))
    assert still["frozen"].clicks == ((4, 4, 1), (6, 3, 1))
    done = {
        name: play(Scripted(truth), Sample(photo(*shape), truth, "a", "g"), replace(PROTOCOLS[name], clicks=3))
        for name in PROTOCOLS
    }
    assert done["frozen"].clicks[1:] == (None, None)
    assert done["ritm"].clicks[1:] == ((0, 0, 0), (0, 0, 0))
    assert done["hrsam"].clicks[1:] == (None, None)
    segmenter = Scripted(truth, empty)  # hrsam asks again with the old clicks, and here loses the mask
    again = play(segmenter, Sample(photo(*shape), truth, "a", "g"), replace(PROTOCOLS["hrsam"], clicks=3))
    assert again.clicks[1] is None
    assert again.ious[1] == 0
    assert segmenter.asked[0] == segmenter.asked[1]


@pytest.mark.parametrize("rule", ["frozen", "hrsam", "ritm"])
def test_the_user_on_a_device_is_the_same_user(rule):
    generator = np.random.default_rng(5)
    truth = rectangle((40, 50), 5, 5, 30, 40)
    clicks = []
    for step in range(15):
        mask = (truth ^ (generator.random(truth.shape) < 0.02)) & (generator.random(truth.shape) < 0.99)
        ignore = generator.random(truth.shape) < 0.01
        seed = random.Random(step) if rule == "hrsam" else None
        expected = next_click(truth, mask, clicks, rule=rule, rng=seed, ignore=ignore)
        seed = random.Random(step) if rule == "hrsam" else None
        there = [torch.from_numpy(array) for array in (truth, mask, ignore)]
        assert next_click(there[0], there[1], clicks, rule=rule, rng=seed, ignore=there[2]) == expected
        clicks.append(expected)
    done = torch.from_numpy(truth)
    nothing = next_click(done, done, [], rule=rule, rng=random.Random(0))
    assert nothing == (Click(0, 0, False) if rule == "ritm" else None)


def test_playing_on_a_device_gives_the_same_clicks(model, sample):
    """Here the device is the CPU; masks differ by rounding at most, and not at all on this picture."""
    there, here = (
        play(ModelSegmenter(model, 64, on_device=on_device), sample, Protocol(clicks=4)) for on_device in (True, False)
    )
    assert there.clicks == here.clicks
    assert there.ious == pytest.approx(here.ious, abs=1e-3)
    assert there.final["size"] == here.final["size"]


@pytest.mark.gpu
def test_playing_on_a_gpu(sample):
    there = play(ModelSegmenter(small_model().cuda(), 64), sample, Protocol(clicks=4))
    here = play(ModelSegmenter(small_model(), 64), sample, Protocol(clicks=4))
    assert there.clicks[0] == here.clicks[0]
    assert there.ious == pytest.approx(here.ious, abs=0.02)


def test_ignored_pixels_are_neither_clicked_nor_counted():
    shape = (12, 20)
    truth = rectangle(shape, 2, 2, 10, 8)
    ignore = rectangle(shape, 0, 5, 12, 20)
    trace = play(
        Scripted(rectangle(shape, 2, 2, 10, 20)),
        Sample(photo(*shape), truth, "a", "g", ignore),
        Protocol(clicks=2),
    )
    assert trace.clicks[0] == (3, 3, 1)  # of the three columns left
    assert trace.clicks[1] is None
    assert trace.ious == (1.0, 1.0)
    assert trace.object == 24


def test_seeded_ties_are_drawn_from_seed_and_name():
    truth = rectangle((40, 60), 10, 10, 30, 50)
    sample = Sample(photo(40, 60), truth, "a", "g")
    first = {play(Scripted(truth), sample, seeded(Protocol(clicks=1), seed)).clicks[0] for seed in range(12)}
    names = {
        play(Scripted(truth), replace(sample, name=str(i)), seeded(Protocol(clicks=1), 0)).clicks[0] for i in range(12)
    }
    assert len(first) > 3
    assert len(names) > 3
    assert next_click(truth, truth & False, []) == Click(19, 19)
    drawn = {next_click(truth, truth & False, [], rng=random.Random(s)).x for s in range(20)}
    assert drawn <= set(range(19, 41))


def test_summary_of_rows_made_by_hand():
    got = summary(rows((0.5, 0.86, 0.91), (0.8, 0.7, 0.7), (0.1, 0.2, 0.3), (0.9, 0.95, 0.95)))
    assert got["samples"] == 4
    assert got["iou"] == pytest.approx([0.575, 0.6775, 0.715])
    assert got["noc"] == {"80": 1.75, "85": 2.25, "90": 2.5, "95": 2.75}  # 80: 2, 1, never (counts as 3), 1
    assert got["never_reached"] == {"80": 1, "85": 2, "90": 2, "95": 3}
    assert got["equals_max"] == {"80": 1, "85": 2, "90": 3, "95": 3}


def test_summary_leaves_out_what_has_no_thin_part():
    with_thin, without = rows([0.5], [0.5])
    traces = [replace(with_thin, thin_recall={"1": 0.25}), replace(without, thin_recall={"1": None})]
    assert summary(traces)["thin_recall"] == {"1": 0.25}
    assert summary(traces[1:])["thin_recall"] == {"1": None}


def test_summary_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="there are no samples"):
        summary([])
    with pytest.raises(ValueError, match="inhomogeneous"):
        summary(rows((0.5, 0.6), (0.5,)))


def test_a_model_plays_like_a_session(model, sample):
    trace = play(ModelSegmenter(model, 64), sample, Protocol(clicks=4))
    session = Session(model, side=64)
    session.set_image(sample.pixels)
    for step in range(4):
        click = trace.click_at(step)
        wrong = sample.mask & ~session.mask if click.positive else session.mask & ~sample.mask
        assert wrong[int(click.y), int(click.x)]
        mask = session.click(click.x, click.y, click.positive).mask
        assert float(iou(mask, sample.mask)) == trace.ious[step]
        assert mask_hash(mask) == trace.masks[step]
    assert all(seconds > 0 for seconds in trace.seconds.values())


def test_a_lower_threshold_gives_a_larger_mask(model, sample):
    areas = []
    for threshold in (0.9, 0.5, 0.49, 0.1):
        segmenter = ModelSegmenter(model, 64, threshold)
        segmenter.start(sample.pixels)
        areas.append(int(segmenter.click((Click(40, 20),)).sum()))
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


def test_a_replay_makes_the_same_clicks_with_another_model(model, sample):
    trace = play(ModelSegmenter(model, 64), sample, Protocol(clicks=3))
    same = play(ModelSegmenter(model, 64), sample, Protocol(clicks=3), trace)
    assert (same.clicks, same.ious, same.masks) == (trace.clicks, trace.ious, trace.masks)
    other = play(ModelSegmenter(small_model(seed=1), 64), sample, Protocol(clicks=3), trace)
    assert other.clicks == trace.clicks
    assert other.masks != trace.masks
    with pytest.raises(ValueError, match="give the traces of this data set and protocol"):
        play(ModelSegmenter(model, 64), sample, Protocol(clicks=4), trace)


def test_protocols_that_make_no_sense_are_refused():
    for wrong in ({"rule": "best"}, {"ties": "last"}, {"clicks": 0}, {"threshold": 1.0}, {"rule": "hrsam"}):
        with pytest.raises(ValueError, match=r"unknown click rule|ties|clicks are"):
            Protocol(**wrong)


def test_protocols_are_told_apart_in_words():
    texts = {name: " ".join(protocol.text()) for name, protocol in PROTOCOLS.items()}
    assert len(set(texts.values())) == 3
    assert "skipped after the distance transform" in texts["ritm"]
    assert "0.49" in texts["ritm"]
    assert "one is drawn, seed 42" in texts["hrsam"]
