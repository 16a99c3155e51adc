"""The click loop, and what is said about its results."""

from dataclasses import replace

import numpy as np
import pytest

from hrsam.data.sample import Sample
from hrsam.evaluation import Played, Protocol, play, summary
from hrsam.metrics import iou
from hrsam.session import Session
from tests.builders import photo, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def sample():
    mask = np.zeros((60, 80), bool)
    mask[15:30, 26:] = True
    return Sample(photo(60, 80), mask, "set/block", "set")


def rows(*ious):
    return [Played(str(i), tuple(row), ()) for i, row in enumerate(ious)]


def test_summary_of_rows_made_by_hand():
    got = summary(rows((0.5, 0.86, 0.91), (0.8, 0.7, 0.7), (0.1, 0.2, 0.3), (0.9, 0.95, 0.95)))
    assert got == {
        "samples": 4,
        "iou@1": 0.575,
        "iou@3": 0.715,
        "noc@80": 1.75,  # 2, 1, never (counts as 3), 1
        "never@80": 1,
        "noc@85": 2.25,  # 2, never, never, 1
        "never@85": 2,
        "noc@90": 2.5,  # 3, never, never, 1
        "never@90": 2,
        "noc@95": 2.75,  # never, never, never, 2
        "never@95": 3,
    }


def test_summary_at_other_thresholds_and_lengths():
    got = summary(rows([0.0] * 4 + [0.5] * 16, [0.75] * 20), thresholds=(0.5,))
    assert got == {
        "samples": 2, "iou@1": 0.375, "iou@3": 0.375, "iou@5": 0.625, "iou@10": 0.625, "iou@20": 0.625,
        "noc@50": 3.0, "never@50": 0,
    }  # fmt: skip


def test_summary_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="there are no samples"):
        summary([])
    with pytest.raises(ValueError, match="not a number"):
        summary(rows((0.5, float("nan"))))
    with pytest.raises(ValueError, match="inhomogeneous"):
        summary(rows((0.5, 0.6), (0.5,)))


def test_play_is_the_loop_of_simulated_clicks(model, sample):
    played = play(model, sample, Protocol(clicks=4, side=64))
    assert played.name == "set/block"
    assert len(played.ious) == len(played.clicks) == 4
    assert played.seconds.keys() == {"encode", "decode", "user"}
    assert all(seconds > 0 for seconds in played.seconds.values())
    session = Session(model, side=64)
    session.set_image(sample.pixels)
    for click, score in zip(played.clicks, played.ious):
        wrong = sample.mask & ~session.mask if click.positive else session.mask & ~sample.mask
        assert wrong[int(click.y), int(click.x)]
        assert float(iou(session.click(click.x, click.y, click.positive).mask, sample.mask)) == score


def test_a_perfect_mask_gets_no_more_clicks_but_keeps_its_score(monkeypatch, model, sample):
    click = Session.click

    def perfect_at_the_second(self, x, y, positive=True):
        prediction = click(self, x, y, positive)
        if len(self.rounds) == 2:
            prediction.__dict__["mask"] = sample.mask
        return prediction

    monkeypatch.setattr(Session, "click", perfect_at_the_second)
    played = play(model, sample, Protocol(clicks=5, side=64))
    assert len(played.clicks) == 2
    assert played.ious[0] < 1
    assert played.ious[1:] == (1.0,) * 4


def test_the_rule_that_draws_is_repeatable(model, sample):
    protocol = Protocol(rule="hrsam", clicks=3, side=64)
    assert play(model, sample, protocol).clicks == play(model, sample, protocol).clicks
    first = [play(model, replace(sample, name=str(i)), Protocol("hrsam", 1, 64)).clicks for i in range(8)]
    assert len(set(first)) > 1  # a stream of its own for each name


def test_an_unknown_rule_is_refused(model, sample):
    with pytest.raises(ValueError, match="unknown click rule 'best'"):
        play(model, sample, Protocol(rule="best", side=64))
