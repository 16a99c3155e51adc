"""The drills of the click page's server: a few of each by default, the full counts with ``-m slow``; and that they notice."""

from collections import deque

import pytest

from hrsam.bench import drills
from hrsam.bench.attacks import attacks
from hrsam.demo import engine
from hrsam.demo.embeddings import Embeddings
from hrsam.demo.guard import Guard


def test_users_at_once_get_the_masks_of_one_alone():
    found = drills.load(sessions=8, clicks=5, laps=2)
    assert (found.clicks, found.errors, found.mismatches) == (80, 0, 0)


@pytest.mark.slow
def test_fifty_users_with_twenty_clicks():
    found = drills.load(sessions=50, clicks=20, laps=6)
    assert (found.clicks, found.errors, found.mismatches) == (6000, 0, 0)
    assert found.p95 <= 2 * 50 * found.solo_median  # fifty clients are in this process too
    assert found.slope < 1


def test_the_load_drill_notices_another_users_mask(monkeypatch):
    monkeypatch.setattr(Embeddings, "get", lambda self, key: next(iter(self._kept.values()), None))
    found = drills.load(sessions=2, clicks=2, laps=1)
    assert found.errors == 0
    assert found.mismatches > 0


@pytest.mark.parametrize("trials", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_racing_clicks_equal_one_order(trials):
    found = drills.races(trials)
    assert (found.trials, found.wrong) == (trials, 0)
    assert found.accepted > 3 * trials
    assert found.taken_back > 0


def test_the_race_drill_notices_a_queue_in_the_wrong_order(monkeypatch):
    class Stack(deque):
        """The last one first."""

        append = deque.appendleft

    monkeypatch.setattr(engine, "deque", Stack)
    assert drills.races(8).wrong > 0


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_loses_no_acknowledged_click(rounds):
    found = drills.kills(rounds)
    assert (found.rounds, found.lost, found.wrong_masks, found.unreadable) == (rounds, 0, 0, 0)
    assert found.acknowledged > rounds / 2
    assert rounds < 100 or found.while_saving > 0


def test_the_kill_drill_notices_a_lost_click():
    class Tab:
        state = {"revision": 2}  # noqa: RUF012
        masks = {1: ({}, b"mask 2")}  # noqa: RUF012

        def close(self):
            pass

    class Alone:
        def masks(self, commands):
            return [b"mask 1", b"mask 2", b"mask 3"][: len(commands)]

    found = drills.Kills(0, 0, 0, 0, 0, 0)
    drills._look(found, Alone(), Tab(), [{}, {}, {}], 3)
    assert (found.lost, found.while_saving, found.wrong_masks) == (1, 0, 0)
    Tab.masks = {1: ({}, b"mask 1")}
    drills._look(found, Alone(), Tab(), [{}, {}, {}], 1)
    assert (found.lost, found.while_saving, found.wrong_masks) == (1, 1, 1)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_attacks_are_refused_and_the_server_lives(every):
    found = attacks(every)
    assert found.broken == []
    assert found.alive
    assert found.tried >= 150 // every


@pytest.mark.parametrize("kind", ["host", "post origin"])
def test_the_attack_drill_notices_an_open_door(kind, monkeypatch):
    monkeypatch.setattr(Guard, "_refusal", lambda self, scope: None)
    found = attacks(kind=kind)
    assert found.tried >= 6
    assert len(found.broken) >= found.tried - 2  # two that are no HTTP are stopped before the guard
