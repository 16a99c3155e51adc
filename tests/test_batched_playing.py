"""Several samples in step: the game of each is the one it would play alone."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrsam.clicks import Click, next_click
from hrsam.data.index import Dataset, Item
from hrsam.data.sample import Sample
from hrsam.evaluation import PROTOCOLS, play, play_together
from hrsam.lockstep import Stopwatch, fetch_later, next_clicks
from hrsam.playing import play_all
from hrsam.segmenters import ModelSegmenter, together
from tests.builders import photo, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(60, 80), (40, 33), (64, 64), (51, 120), (90, 45)]


def make_sample(index, ignore=False):
    height, width = SIZES[index]
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2 + index, width // 3 : width - 3 * index] = True
    unseen = None
    if ignore:
        unseen = np.zeros_like(mask)
        unseen[:, width // 2 : width // 2 + 9] = True
        mask &= ~unseen
    return Sample(photo(height, width, seed=index), mask, f"set/{index}", "set", unseen)


SAMPLES = [make_sample(i, ignore=i in (1, 3)) for i in range(len(SIZES))]


@pytest.fixture(scope="module")
def model():
    return small_model()


def protocol(name, clicks=5):
    return replace(PROTOCOLS[name], clicks=clicks)


def same_game(batched, alone):
    for there, here in zip(batched, alone, strict=True):
        assert there.name == here.name
        assert there.clicks == here.clicks
        assert there.ious == pytest.approx(here.ious, abs=1e-4)
        for key in here.boundary_ious:
            assert there.boundary_ious[key] == pytest.approx(here.boundary_ious[key], abs=1e-3)
        assert there.final["size"] == here.final["size"]
        assert there.object == here.object


class Solved(ModelSegmenter):
    """A model that knows the truth of some samples, by the shape of their pictures, from their second click on."""

    def __init__(self, model, known, **options):
        super().__init__(model, 64, **options)
        self.known = {sample.mask.shape: sample.mask for sample in known}
        self.asked = []

    def click_all(self, clicks):
        self.asked.append([None if made is None else len(made) for made in clicks])
        masks = super().click_all(clicks)
        for index, (place, made) in enumerate(zip(self._places, clicks)):
            truth = self.known.get((place.frame.height, place.frame.width))
            if made is not None and len(made) >= 2 and truth is not None:
                masks[index] = truth if self.device is None else torch.from_numpy(truth)
        return masks


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_batch_plays_what_each_plays_alone(model, name, on_device):
    segmenter = ModelSegmenter(model, 64, PROTOCOLS[name].threshold, on_device=on_device)
    batched = play_together(segmenter, SAMPLES, protocol(name))
    same_game(batched, [play(segmenter, sample, protocol(name)) for sample in SAMPLES])
    assert len({trace.clicks for trace in batched}) == len(SAMPLES)
    assert all(seconds > 0 for trace in batched for seconds in trace.seconds.values())
    assert batched[0].seconds["encode"] == batched[4].seconds["encode"]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_one_that_is_perfect_early_changes_nothing_for_the_others(model, name, on_device):
    segmenter = Solved(model, [SAMPLES[1]], on_device=on_device)
    batched = play_together(segmenter, SAMPLES, protocol(name))
    asked = segmenter.asked[:]
    same_game(batched, [play(segmenter, sample, protocol(name)) for sample in SAMPLES])
    # From the third round on: frozen leaves it alone, hrsam asks again with its two clicks, ritm clicks into the corner.
    later = {"frozen": [None] * 3, "hrsam": [2] * 3, "ritm": [3, 4, 5]}[name]
    assert asked == [[1] * 5, [2] * 5, *([k, done, k, k, k] for k, done in zip((3, 4, 5), later))]
    assert batched[1].ious[1:] == (1.0,) * 4
    assert batched[1].clicks[2:] == {"ritm": ((0, 0, 0),) * 3}.get(name, (None,) * 3)


def test_a_round_is_one_decode_of_those_alike(model, monkeypatch):
    sizes = []
    real = model.decode

    def counted(embedding, points, *args, **kwargs):
        sizes.append(tuple(points.shape))
        return real(embedding, points, *args, **kwargs)

    monkeypatch.setattr(model, "decode", counted)
    play_together(ModelSegmenter(model, 64), SAMPLES, protocol("ritm", 3))
    assert sizes == [(5, 1, 2), (5, 2, 2), (5, 3, 2)]
    sizes.clear()
    play_together(Solved(model, [SAMPLES[1]]), SAMPLES, protocol("hrsam", 4))
    assert sizes == [(5, 1, 2), (5, 2, 2), (4, 3, 2), (1, 2, 2), (4, 4, 2), (1, 2, 2)]


def test_pictures_are_encoded_in_one_call(model, monkeypatch):
    counts = []
    real = model.encode_normalised
    monkeypatch.setattr(model, "encode_normalised", lambda images: counts.append(len(images)) or real(images))
    play_together(ModelSegmenter(model, 64), SAMPLES, protocol("frozen", 1))
    assert counts == [5]


def test_given_clicks_are_made_and_a_stop_among_them_is_kept(model):
    segmenter = ModelSegmenter(model, 64)
    given = [play(segmenter, sample, protocol("frozen")) for sample in SAMPLES]
    given[2] = replace(given[2], clicks=(*given[2].clicks[:2], None, *given[2].clicks[3:]))
    given[3] = replace(given[3], clicks=(None, *given[3].clicks[1:]))
    other = ModelSegmenter(small_model(seed=1), 64)
    batched = play_together(other, SAMPLES, protocol("frozen"), given)
    assert [trace.clicks for trace in batched] == [trace.clicks for trace in given]
    same_game(batched, [play(other, sample, protocol("frozen"), trace) for sample, trace in zip(SAMPLES, given)])
    with pytest.raises(ValueError, match="the trace of set/0 has 5 steps"):
        play_together(other, SAMPLES, protocol("frozen", 6), given)


def check_next_clicks(rule, drawn, device):
    generator = np.random.default_rng(5)
    truths = [sample.mask for sample in SAMPLES]
    clicks = [[] for _ in truths]
    rngs = [[random.Random(i) if drawn else None for i in range(5)] for _ in range(2)]
    for step in range(12):
        masks = [
            truth ^ (generator.random(truth.shape) < 0.02) if step % 3 else truth & (step == 0) for truth in truths
        ]
        masks[step % 5] = truths[step % 5]  # done, but for what ignore and earlier clicks do
        ignores = [None if i == 2 else generator.random(truth.shape) < 0.01 for i, truth in enumerate(truths)]
        expected = [
            next_click(truth, mask, made, rule=rule, rng=rng, ignore=ignore)
            for truth, mask, made, rng, ignore in zip(truths, masks, clicks, rngs[0], ignores)
        ]
        there = [
            [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
            for arrays in (truths, masks, ignores)
        ]
        assert next_clicks(*there[:2], clicks, rule=rule, rngs=rngs[1], ignores=there[2]) == expected
        for made, click in zip(clicks, expected):
            made += [click] if click is not None else []
    assert min(map(len, clicks)) >= 6


USERS = pytest.mark.parametrize(
    ("rule", "drawn"), [("frozen", False), ("frozen", True), ("hrsam", True), ("ritm", False), ("ritm", True)]
)


@USERS
def test_next_clicks_are_the_next_click_of_each(rule, drawn):
    check_next_clicks(rule, drawn, "cpu")


@pytest.mark.gpu
@USERS
def test_next_clicks_on_a_gpu(rule, drawn):
    check_next_clicks(rule, drawn, "cuda")


def test_next_clicks_refuse_what_next_click_refuses():
    truth = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="draws among equals"):
        next_clicks([truth], [truth], [[]], rule="hrsam", rngs=[None], ignores=[None])
    for wrong, words in (({"rule": "best"}, "unknown click rule"), ({}, "outside the picture of 5 x 4")):
        with pytest.raises(ValueError, match=words):
            next_clicks([truth], [truth], [[Click(5, 1)]], rngs=[None], ignores=[None], **wrong)
    assert next_clicks([], [], [], rngs=[], ignores=[]) == []


def test_what_plays_alone_is_refused_in_a_batch():
    class Single:
        def start(self, pixels): ...

        def click(self, clicks): ...

    assert together(Single(), 1)
    with pytest.raises(ValueError, match="Single takes one picture at a time; got 2"):
        play_together(Single(), SAMPLES[:2], protocol("frozen"))
    segmenter = ModelSegmenter(small_model(), 64)
    with pytest.raises(ValueError, match="got clicks for 1 pictures, 0 are set"):
        segmenter.click([Click(0, 0)])


def test_seconds_are_divided(monkeypatch):
    spent = [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]
    ticks = iter([0.0, 1.0, 2.0, 5.0, 11.0])
    monkeypatch.setattr("hrsam.lockstep.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    watch = Stopwatch(None)
    watch.lap("a", spent)
    watch.start()
    watch.lap("b", spent)
    watch.lap("b", spent[:1])
    watch.stop()
    assert spent == [{"a": 0.5, "b": 7.5}, {"a": 0.5, "b": 1.5}]


def test_masks_are_fetched_as_they_are():
    masks = [sample.mask for sample in SAMPLES]
    for given in (masks, [torch.from_numpy(mask) for mask in masks]):
        assert all(np.array_equal(a, b) for a, b in zip(fetch_later(given)(), masks, strict=True))


class Remembered(Dataset):
    """The samples above as a data set."""

    def load(self, item):
        return SAMPLES[int(item.name[-1])]


def remembered():
    return Remembered("set", tuple(Item(s.name, "set", None, None) for s in SAMPLES), (), None, "")


def test_too_little_memory_halves_the_batch(model, monkeypatch, tmp_path, caplog):
    """The fake device holds three pictures."""
    counts = []
    real = model.encode_normalised

    def encode(images):
        counts.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images)

    monkeypatch.setattr(model, "encode_normalised", encode)
    with caplog.at_level(logging.WARNING, logger="hrsam"):
        traces = play_all(remembered(), lambda: ModelSegmenter(model, 64), protocol("frozen", 2), {}, tmp_path, batch=4)
    assert counts == [4, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "not enough memory for 4 samples at once; going on with 2"
    ]
    same_game(traces, [play(ModelSegmenter(model, 64), sample, protocol("frozen", 2)) for sample in SAMPLES])


def test_too_little_memory_in_the_middle_of_a_game_loses_nothing(model, monkeypatch, tmp_path):
    calls = []
    real = model.decode

    def decode(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "decode", decode)
    traces = play_all(remembered(), lambda: ModelSegmenter(model, 64), protocol("hrsam", 3), {}, tmp_path, batch=5)
    assert len(calls) == 2 + 3 * 3  # then two, two and one
    same_game(traces, [play(ModelSegmenter(model, 64), sample, protocol("hrsam", 3)) for sample in SAMPLES])


def test_too_little_memory_for_one_is_an_error(model, monkeypatch, tmp_path):
    def encode(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "encode_normalised", encode)
    with pytest.raises(ValueError, match="the memory of the device does not suffice for set/0; use a smaller --side"):
        play_all(remembered(), lambda: ModelSegmenter(model, 64), protocol("frozen"), {}, tmp_path, batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_batch_on_a_gpu(name):
    segmenter = ModelSegmenter(small_model().cuda(), 64, PROTOCOLS[name].threshold)
    batched = play_together(segmenter, SAMPLES, protocol(name))
    alone = [play(segmenter, sample, protocol(name)) for sample in SAMPLES]
    for there, here in zip(batched, alone, strict=True):
        assert there.clicks[0] == here.clicks[0]
        assert there.ious == pytest.approx(here.ious, abs=0.02)
        assert all(seconds > 0 for seconds in there.seconds.values())
