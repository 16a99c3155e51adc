"""Lines of a run's log: means, totals, rates; what is taken back after a resume; the bar and TensorBoard."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hrsam import progress
from hrsam.progress import BOARD, LOG, Meter, Reports, in_words, used_memory


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until ``clock.now`` is set."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def numbers(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def measured(meter, losses, images=4):
    for loss in losses:
        meter.add(numbers(loss=loss, iou=loss / 10), numbers(images=images))


def test_a_line_holds_means_totals_and_rates(clock):
    meter = Meter()
    measured(meter, [1.0, 2.0])
    clock.now += 4
    assert meter.line() == {"loss": 1.5, "iou": 0.15, "images": 8, "images_per_s": 2.0}
    measured(meter, [5.0])
    clock.now += 8
    assert meter.line() == {"loss": 5.0, "iou": 0.5, "images": 12, "images_per_s": 0.5}


@pytest.mark.parametrize("killed_after", range(5))
def test_a_line_is_the_same_after_a_resume(clock, killed_after):
    losses = [0.1, 0.7, 0.3, 0.9]
    straight, killed, resumed = Meter(), Meter(), Meter()
    measured(straight, losses)
    measured(killed, losses[:killed_after])
    clock.now += 1000  # nobody trained in between
    resumed.load(json.loads(json.dumps(killed.state())))
    measured(resumed, losses[killed_after:])
    clock.now += 1
    after = resumed.line()
    assert {**after, "images_per_s": None} == {**straight.line(), "images_per_s": None}
    assert after["images_per_s"] == 4.0 * (4 - killed_after)


def test_memory_is_told():
    assert 0.01 < used_memory(torch.device("cpu")) < 1000


def line(step, loss=1.0):
    return {"step": step, "side": 64, "loss": loss}


def written(folder):
    return [(each["step"], each["loss"]) for each in map(json.loads, (folder / LOG).read_text().splitlines())]


def curves(folder):
    """(step, value) of the loss, and the steps of pictures, as TensorBoard shows them."""
    found = EventAccumulator(str(folder / BOARD)).Reload()
    tags = found.Tags()
    scalars = [(event.step, event.value) for event in found.Scalars("train/loss")]
    return scalars, [event.step for event in found.Images("train/clicks")] if tags["images"] else []


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "si'])
def test_what_came_after_the_checkpoint_is_taken_back(tmp_path, torn):
    reports = Reports(tmp_path, 0, 10, live=False)
    for step in range(1, 6):
        reports.write(line(step, loss=step))
        reports.picture(np.zeros((8, 16, 3), np.uint8), step)
    reports.close()
    with open(tmp_path / LOG, "ab") as file:
        file.write(torn)
    reports = Reports(tmp_path, 3, 10, live=False)
    for step in range(4, 7):
        reports.write(line(step, loss=10 * step))
    reports.close()
    wanted = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert written(tmp_path) == wanted
    scalars, pictures = curves(tmp_path)
    assert scalars == wanted
    assert pictures == [1, 2, 3]


def test_a_line_that_is_no_line_is_named(tmp_path):
    for wrong in (b"not json\n", b"[1]\n", b'{"loss": 1}\n'):
        log = tmp_path / "log.jsonl"
        log.write_bytes(b'{"step": 1}\n' + wrong)
        with pytest.raises(ValueError, match=r"log\.jsonl:2 is no line of a run's log; remove the line"):
            Reports(tmp_path, 5, 10, live=False)
        assert log.read_bytes().endswith(wrong)


def test_flushed_curves_survive_a_kill(tmp_path):
    reports = Reports(tmp_path, 0, 10, live=False)
    reports.write(line(1))
    reports.flush()
    assert curves(tmp_path)[0] == [(1, 1.0)]  # not closed
    reports.close()


def test_without_tensorboard_a_run_goes_on_with_a_note(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        reports = Reports(tmp_path, 0, 10, live=False)
    (said,) = caplog.messages
    assert "pip install 'hrsam[train]'" in said
    reports.write(line(1))
    reports.picture(np.zeros((8, 8, 3), np.uint8), 1)
    reports.flush()
    reports.close()
    assert written(tmp_path) == [(1, 1.0)]
    assert not (tmp_path / BOARD).exists()


def test_the_line_in_words():
    rates = {"images": 80, "images_per_s": 12.34, "clicks_per_s": 1234.5, "tokens_per_s": 2.5e6}
    assert in_words({**line(20), "iou_first": 0.5, "iou_last": 0.75, **rates, "memory_gib": 3.14159}) == (
        "step 20 · 64 px · loss 1.000 · iou_first 0.500 · iou_last 0.750 · "
        "12.3 images/s · 1.2k clicks/s · 2.5M tokens/s · 3.1 GiB"
    )
    assert in_words({**line(20), "memory_gib": 1, "waiting": 0.345}).endswith(" · waits 34% for data · 1.0 GiB")
    assert "waits" not in in_words({**line(20), "memory_gib": 1, "waiting": 0.05})


def test_the_bar_shows_the_line_on_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    reports = Reports(tmp_path, 0, 4, live=True)
    try:
        reports.write({**line(1), "images_per_s": 12.0, "memory_gib": 1.0})
        reports.advance(1)
        reports.bar.progress.refresh()
    finally:
        reports.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "12.0 images/s" in err
    assert "25%" in err
