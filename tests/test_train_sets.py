"""Training on data sets that are read while it runs, as canvases and as whole pictures in packs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hrsam import train as training
from hrsam.checkpoint import load_state
from hrsam.data import stream
from hrsam.data.packing import UNITS
from hrsam.data.stream import Source, Stream
from hrsam.optim import Gradients, Phase
from hrsam.rollout import ClickRollout
from hrsam.train import PackedPictures, open_feed, start_model, uploaded
from tests.builders import photo
from tests.processes import exit_code
from tests.test_train import SCRIPT
from tests.tiny_training import assert_same_logs, assert_same_states, last_state, log_lines, settings

pytestmark = pytest.mark.usefixtures("small_preset")

SIZES = ((40, 64), (64, 30), (50, 50), (33, 90), (64, 64), (20, 100))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six pictures; the object of each is a block of one colour, the second has another one."""
    folder = tmp_path_factory.mktemp("sets") / "part"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        pixels = photo(height, width, number)
        mask = (pixels == (200, 40, 90)).all(2)
        Image.fromarray(pixels).save(folder / "images" / f"p{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"p{number}_0.png")
        if number == 1:
            Image.fromarray((~mask).astype(np.uint8) * 255).save(folder / "masks" / "p1_1.png")
    return folder


def canvases(out, root, **changes):
    return settings(out, data=(), sets=(Source(name="pairs", root=str(root)),), **{"workers": 0, **changes})


def packed(out, root, tokens=60, reduction="image", **changes):
    form = PackedPictures(smallest=0.5, tokens=tokens, reduction=reduction)
    return canvases(out, root, **{"packed": form, "graphs": False, "compile": "none", "batch": 4, **changes})


FORMS = pytest.mark.parametrize("form", [canvases, packed])


@FORMS
def test_a_run_writes_state_log_and_picture(tmp_path, root, form):
    run = form(tmp_path, root)
    state = load_state(training.train(run))
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [1, 2]
    images = run.phases[0].batch
    assert [line["images"] for line in lines] == [images, 2 * images]
    begin = start_model(run).state_dict()
    assert sum(not torch.equal(value, begin[name]) for name, value in state["model"].items()) > 50
    for line in lines:
        assert 0 < line["loss"] < 10
        assert 0 <= line["iou_first"] <= 1
        assert 0 <= line["iou_last"] <= 1
        assert line["clicks"] >= 3 * line["images"]
    assert lines[0]["tokens"] > 0


def test_waiting_for_data_is_seen(tmp_path, root, monkeypatch):
    """A step that waits half a second for its pictures, and next to nothing without."""
    load = stream.load_shot

    def slow(shot):
        time.sleep(0.25)
        return load(shot)

    training.train(canvases(tmp_path / "a", root))
    monkeypatch.setattr(stream, "load_shot", slow)
    training.train(canvases(tmp_path / "b", root))
    quick, waiting = (log_lines(canvases(tmp_path / name, root))[-1] for name in "ab")
    assert waiting["waiting"] > 0.3 > quick["waiting"] > 0
    assert quick["waiting"] < waiting["waiting"] < 1


def test_each_picture_of_a_step_has_a_canvas(tmp_path, root, monkeypatch):
    """Whatever the parts, the pictures of a step are the next of the epoch and come once each."""
    seen = []
    make = training.make_batch

    def watched(bank, count, side, generator, canvas, photos):
        seen.append(([bank.names[i] for i in photos], bank.side, side))
        return make(bank, count, side, generator, canvas, photos)

    monkeypatch.setattr(training, "make_batch", watched)
    training.train(canvases(tmp_path, root, batch=1, accumulate=3, steps=2, seed=3))
    assert [(len(names), side, canvas) for names, side, canvas in seen] == [(1, 64, 64)] * 6
    assert sorted(names[0] for names, *_ in seen) == [f"part/p{i}" for i in range(6)]


def test_pictures_that_are_left_out_leave_the_others(tmp_path, root):
    """A step of two pictures, of which one cannot be read, makes its two canvases of the other."""
    broken = tmp_path / "part"
    for path in sorted(root.rglob("*.png")):
        target = broken / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (broken / "images" / "p3.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(ValueError, match=r"p3\.png"):
        training.train(canvases(tmp_path / "a", broken, steps=3))
    run = canvases(tmp_path / "b", broken, steps=3, on_error="skip")
    training.train(run)
    assert log_lines(run)[-1]["step"] == 3
    run = packed(tmp_path / "c", broken, steps=3, batch=2, on_error="skip")
    training.train(run)
    assert log_lines(run)[-1]["images"] == 5


# ---------------------------------------------------------------- packs


@pytest.mark.parametrize("reduction", list(UNITS))
def test_packs_and_parts_do_not_change_a_step(tmp_path, root, reduction, monkeypatch):
    """One part of a single large pack, and four parts of small ones: the same pictures, clicks, loss and gradient."""
    gradients = []
    clip = Gradients.clip
    monkeypatch.setattr(Gradients, "clip", lambda self, most: gradients.append(self.flat.clone()) or clip(self, most))
    lines = []
    for name, changes in {"whole": {"tokens": 10_000}, "cut": {"batch": 1, "tokens": 1, "accumulate": 4}}.items():
        run = packed(tmp_path / name, root, reduction=reduction, steps=1, **changes)
        training.train(run)
        lines += log_lines(run)
    a, b = lines
    assert (a["images"], a["clicks"], a["tokens"]) == (b["images"], b["clicks"], b["tokens"])
    for curve in ("loss", "iou_first", "iou_last"):
        assert a[curve] == pytest.approx(b[curve], abs=2e-4), curve
    whole, cut = gradients
    assert whole.norm() > 1e-3
    assert (whole - cut).norm() < 1e-4 * whole.norm()


def test_the_loss_of_a_step_is_the_formula(tmp_path, root, monkeypatch):
    """Σ objects weight · loss / Σ objects weight over the whole step, with two pictures of different numbers of objects."""
    run = packed(tmp_path, root, tokens=1, reduction="object", steps=1, batch=6)
    single, weights = [], []
    play = ClickRollout._play

    def watched(self, *args):
        loss, iou = play(self, *args)
        single.extend(loss.mean(0).tolist())
        return loss, iou

    sums = training.loss_weights

    def weighing(reduction, shapes, total, ranks):
        weights.extend(w for s, w in zip(shapes, sums(reduction, shapes, total, ranks)) for _ in range(s.objects))
        return sums(reduction, shapes, total, ranks)

    monkeypatch.setattr(ClickRollout, "_play", watched)
    monkeypatch.setattr(training, "loss_weights", weighing)
    training.train(run)
    assert len(single) == 7  # one picture has two
    assert weights == pytest.approx([1 / 7] * 7)
    assert log_lines(run)[0]["loss"] == pytest.approx(np.mean(single), abs=1e-4)


def test_the_picture_shown_is_the_one_answered_last(tmp_path, root):
    """The first of the last pack, and of what was answered in the batch what lies on it."""
    run = packed(tmp_path, root, tokens=10_000, batch=6)
    feed, _ = open_feed(run, start_model(run), 0, 1)
    model = start_model(run).train()
    task = training.PackedTask(model, feed, run)
    assert task.picture() is None
    plan = training.random.Random(1)
    part = training.Part(0, 0, 1, run.phases[0], torch.Generator(), plan, torch.Tensor.backward)
    packs, packed_rounds = [], task.rollout.packed
    task.rollout.packed = lambda *args: packs.append(args[:2]) or packed_rounds(*args)
    task.part(part)
    pixels, truth = task.seen
    assert torch.equal(pixels, packs[-1][0][0])
    assert torch.equal(truth, packs[-1][1][0][0])
    picture = task.picture()
    assert picture.shape == (truth.shape[0], 2 * truth.shape[1], 3)
    _, clicks = task.witness.last_seen(*truth.shape)
    assert truth[int(clicks[0].y), int(clicks[0].x)] or len(clicks) > 1
    for first, label in zip(clicks, task.witness.last[1].tolist()):
        assert first.positive == (label == 1)
    # a picture of 33 x 20 in a batch of 64 x 96: up to 48 x 32 the answer is its own, whatever is said beyond
    for beyond in (-1e4, 1e4):
        own = torch.full((16, 24), beyond)
        own[:12, :8] = torch.linspace(-1, 1, 96).view(12, 8)
        task.witness.last = *task.witness.last[:2], own
        mask, _ = task.witness.last_seen(48, 32)
        want = torch.nn.functional.interpolate(own[None, None, :12, :8], scale_factor=4, mode="bilinear")[0, 0] > 0
        np.testing.assert_array_equal(mask, want.numpy())
        assert task.witness.last_seen(33, 20)[0].shape == (33, 20)
    task.close()


def test_arrays_are_uploaded_together():
    pixels = [photo(5, 7, 1)[..., ::-1], photo(3, 2, 2)]
    for array, tensor in zip(pixels, uploaded(pixels, torch.device("cpu")), strict=True):
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(tensor.numpy(), array)
    masks = [np.eye(4, dtype=bool)[None], np.ones((2, 3, 1), dtype=bool)]
    for array, tensor in zip(masks, uploaded(masks, torch.device("cpu")), strict=True):
        assert tensor.dtype == torch.bool
        np.testing.assert_array_equal(tensor.numpy(), array)


# ---------------------------------------------------------------- resume, processes


def killed_child(run, step):
    from tests.tiny_training import use_small_preset

    use_small_preset()
    batches = Stream.batches

    def until(self, *args):
        for batch in batches(self, *args):
            if batch.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    Stream.batches = until
    training.train(run)


SLOW = pytest.mark.slow
CASES = [
    pytest.param(f, n, marks=() if (f, n) in ((canvases, 0), (packed, 2)) else SLOW)
    for f in (canvases, packed)
    for n in range(3)
]


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize(("form", "workers"), CASES)
def test_a_killed_run_goes_on_to_the_same_last_bit(tmp_path, root, form, workers):
    """Two phases; killed in the second while its pictures are loaded ahead."""
    phases = (Phase(side=64, batch=2, steps=3, lr=1e-3), Phase(side=32, batch=3, steps=4, lr=1e-3))
    changes = {"phases": phases, "save_every": 2, "log_every": 1}
    straight = form(tmp_path / "straight", root, **changes)
    training.train(straight)
    run = form(tmp_path / "run", root, workers=workers, **changes)
    assert exit_code(killed_child, run, 5) == -signal.SIGKILL
    assert log_lines(run)[-1]["step"] == 5
    training.train(run)
    assert_same_states(last_state(run), last_state(straight))
    assert_same_logs(run, straight)


@pytest.mark.slow
@FORMS
def test_two_processes_equal_one_that_accumulates(tmp_path, root, form):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one = form(tmp_path / "one", root, steps=3, batch=2, accumulate=2)
    training.train(one)
    run = one.model_copy(update={"out": str(tmp_path / "two"), "accumulate": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fresh = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "run.yaml")], env=fresh, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    a, b = last_state(one), last_state(run)
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=0, atol=2e-6, msg=name)
    for x, y in zip(log_lines(one), log_lines(run), strict=True):
        assert (y["step"], y["images"], y["clicks"], y["tokens"]) == (x["step"], x["images"], x["clicks"], x["tokens"])
        assert y["loss"] == pytest.approx(x["loss"], abs=1e-4)
