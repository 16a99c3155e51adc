"""Training on a few coloured shapes: steps, checkpoints, parts of a step, and what a run writes."""

import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hrsam import loop
from hrsam import train as training
from hrsam.checkpoint import load_state, step_of
from hrsam.data.bank import PhotoBank
from hrsam.data.transforms import make_batch
from hrsam.loop import Part, seed_of
from hrsam.models.block import Block
from hrsam.models.model import HRSAM
from hrsam.optim import Phase, parameter_groups
from hrsam.rollout import ClickRollout, Rounds
from hrsam.train import ClickTask, TrainSettings, fingerprint, load_bank
from hrsam.weightfile import save
from tests.builders import small_config
from tests.tiny_training import assert_same_states, last_state, log_lines, on_batch, settings, write_photos

pytestmark = pytest.mark.usefixtures("small_preset")

GUESSES = "mask_decoder.output_hypernetworks_mlps."  # only the best of them is pulled
BOXES = "prompt_encoder.point_embeddings."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "part1")


@pytest.fixture(scope="module")
def bank(folder):
    return PhotoBank.load([folder], long_side=64)


def no_pieces(loss):
    raise AssertionError("canvases go backward as a whole")


def fresh_model(seed=0):
    torch.manual_seed(seed)
    return HRSAM(small_config()).train()


def test_a_run_writes_state_and_log(tmp_path, folder, monkeypatch):
    canvases = []
    on_batch(monkeypatch, lambda number, batch: canvases.append(batch.pixels) or batch)
    run = settings(tmp_path / "new" / "run", data=(str(folder),))
    path = training.train(run)
    assert path.parent == tmp_path / "new" / "run" / "checkpoints"
    assert step_of(path) == 2
    state = load_state(path)
    assert state["step"] == 2
    assert TrainSettings(**state["settings"]) == run
    start = fresh_model(run.seed).state_dict()
    assert state["model"].keys() == state["average"].keys() == start.keys()
    fixed = [name for name, value in state["model"].items() if torch.equal(value, start[name])]
    fixed.remove("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
    assert all(name.startswith((GUESSES, BOXES)) for name in fixed), fixed  # no step began with a box
    assert len(canvases) == 2
    assert not torch.equal(*canvases)
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["images"] for line in lines] == [2, 4]
    assert [line["tokens"] for line in lines] == [40, 80]  # 4 × 4 patches and 2 × 2 of the anchor map
    assert [line["lr"] for line in lines] == [round(run.lr_at(step), 9) for step in (0, 1)]
    for line in lines:
        assert 0 < line["loss"] < 10
        assert 0 <= line["iou_first"] <= 1
        assert line["grad_norm"] > 0
        assert line["memory_gib"] > 0
        assert line["clicks_per_s"] > line["images_per_s"] > 0  # two objects an image, at least three prompts each


def test_a_finished_run_is_not_repeated_and_another_seed_differs(tmp_path, bank):
    path = training.train(settings(tmp_path, steps=1), bank=bank)
    first = load_state(path)
    assert_same_states(load_state(training.train(settings(tmp_path, steps=1), bank=bank)), first)
    other = load_state(training.train(settings(tmp_path / "other", steps=1, seed=1), bank=bank))
    name = "encoder.patch_embed.weight"
    assert not torch.equal(other["model"][name], first["model"][name])
    start = fresh_model().state_dict()[name]  # the average of early steps forgets it quickly
    torch.testing.assert_close(first["average"][name], start.lerp(first["model"][name], 0.9))


def test_stop_after_saves_and_returns(tmp_path, bank):
    path = training.train(settings(tmp_path), bank=bank, stop_after=0)
    assert load_state(path)["step"] == step_of(path) == 0


class Plan(random.Random):
    """A course whose first draw, the kind of the first prompt, is given."""

    def __init__(self, kind):
        super().__init__(0)
        self.kind = kind

    def random(self):
        kind, self.kind = self.kind, None
        return super().random() if kind is None else kind


KINDS = {"box": 0.0, "random clicks": 0.2, "click": 0.9}


def test_gradients_reach_every_parameter(tmp_path, bank):
    model = fresh_model()
    rollout = ClickRollout(model, Rounds())
    moved = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for kind, draw in KINDS.items():
        generator = torch.Generator().manual_seed(1)
        batch = make_batch(bank, 2, 64, generator)
        loss, ious = rollout(batch.pixels, batch.truth, generator, Plan(draw))
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert loss.isfinite()
        assert ious.shape == (4,)  # three rounds and the last; silent ones are not trained
        for name, p in model.named_parameters():
            assert p.grad is not None, (kind, name)
            moved[name] += float(p.grad.abs().sum())
    assert all(math.isfinite(total) for total in moved.values())
    still = [name for name, total in moved.items() if total == 0]
    assert all(name.startswith(GUESSES) for name in still), still


def test_the_loss_of_a_batch_falls(tmp_path, bank):
    model = fresh_model()
    rollout = ClickRollout(model, settings(tmp_path).rounds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = make_batch(bank, 2, 64, torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss, _ = rollout(batch.pixels, batch.truth, torch.Generator().manual_seed(2), Plan(KINDS["click"]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


def test_the_anchor_is_half_the_canvas_in_training(tmp_path):
    rollout = ClickRollout(HRSAM(small_config(anchor_side=512)), settings(tmp_path).rounds)
    rollout.set_side(384)
    assert rollout.model.encoder.anchor_side == 192
    plain = ClickRollout(HRSAM(small_config(anchor_side=None)), settings(tmp_path).rounds)
    plain.set_side(384)
    assert plain.model.encoder.anchor_side is None


def test_held_out_photos_are_not_trained_on(folder, tmp_path):
    run = settings(tmp_path, data=(str(folder),), hold_out=2)
    assert load_bank(run).names == ("part1/shape0", "part1/shape2")
    assert len(load_bank(settings(tmp_path, data=(str(folder),)))) == 4


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock that moves on by a tenth of a second whenever somebody looks at it."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 10)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "CLOCK_EVERY", 2)


def test_a_time_budget_is_kept_and_shared_out_to_the_phases(tmp_path, bank, slow_clock):
    phases = (Phase(side=32, batch=1, steps=3, lr=1e-3), Phase(side=64, batch=1, steps=1, lr=5e-4))
    run = settings(tmp_path, phases=phases, budget=6.0, save_every=99)
    state = load_state(training.train(run, bank=bank))
    lines = log_lines(run)
    sides = [line["side"] for line in lines]
    assert 6.0 <= state["spent"] < 7.0
    assert state["step"] % 2 == 0
    assert sides == sorted(sides)
    assert 0.5 < sides.count(32) / len(sides) < 0.95  # three quarters of the time
    assert sides.count(64) > 0
    assert lines[-1]["lr"] < 5e-4 < lines[0]["lr"]  # it falls over the last part of the time


def test_a_time_budget_ends_with_a_line(tmp_path, bank, slow_clock):
    """Seven steps a line, and a number of steps that the clock decides."""
    state = load_state(training.train(settings(tmp_path, budget=6.0, log_every=7, save_every=99), bank=bank))
    steps = [line["step"] for line in log_lines(settings(tmp_path))]
    assert state["step"] % 7
    assert steps == [*range(7, state["step"], 7), state["step"]]


def test_a_spent_budget_is_not_spent_again(tmp_path, bank, slow_clock):
    first = load_state(training.train(settings(tmp_path, budget=2.0), bank=bank))
    again = load_state(training.train(settings(tmp_path, budget=2.0), bank=bank))
    assert again["step"] == first["step"] > 0


def test_a_run_can_start_from_weights(tmp_path, bank):
    torch.manual_seed(5)
    begin = HRSAM(small_config())
    save(begin, tmp_path / "begin.safetensors", metadata={"licence": "none", "source": "test"})
    run = settings(tmp_path / "a", steps=1, start=str(tmp_path / "begin.safetensors"))
    run = run.model_copy(update={"phases": (Phase(side=64, batch=2, steps=1, lr=0.0),)})
    state = load_state(training.train(run, bank=bank))
    for name, value in begin.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    save(
        HRSAM(small_config(anchor_side=None)),
        tmp_path / "other.safetensors",
        metadata={"licence": "none", "source": "test"},
    )
    with pytest.raises(ValueError, match="not a test; start from weights of that architecture"):
        training.train(settings(tmp_path / "b", start=str(tmp_path / "other.safetensors")), bank=bank)
    assert not (tmp_path / "b").exists()


def test_a_step_is_the_mean_over_its_parts(tmp_path, bank):
    """Three parts of one canvas, the gradient in one vector and a fused update, against plain PyTorch."""
    run = settings(tmp_path, steps=1, batch=1, accumulate=3)
    state = load_state(training.train(run, bank=bank))
    (line,) = log_lines(run)
    model = fresh_model()
    task, losses = ClickTask(model, bank, run), []
    for index in range(3):
        seed, plan = seed_of(run.seed, 0, 1 + index), random.Random(seed_of(run.seed, 0, 0))
        outcome = task.part(Part(0, index, 3, run.phases[0], torch.Generator().manual_seed(seed), plan, no_pieces))
        losses.append(outcome.loss)
    mean = sum(losses) / 3
    mean.backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    groups = parameter_groups(model, run.weight_decay)
    torch.optim.AdamW(groups, lr=run.lr_at(0), betas=run.betas, foreach=False).step()
    assert line["loss"] == pytest.approx(mean.item(), abs=1e-4)
    assert line["grad_norm"] == pytest.approx(norm.item(), abs=2e-3)
    assert line["images"] == 3
    moved = 0
    for name, value in model.state_dict().items():
        # Adam's first step has the size of the rate, whatever the gradient; where that is next to 0 rounding decides its sign
        near = (state["model"][name] - value).abs() < 1e-6
        moved += near.sum().item()
        assert near.float().mean() > 0.99, name
    assert moved > 0.999 * sum(value.numel() for value in model.state_dict().values())


def test_parts_draw_different_canvases_and_the_same_rounds(tmp_path, bank, monkeypatch):
    seen = []
    forward = ClickRollout.forward

    def watched(self, pixels, truth, generator, plan):
        seen.append((pixels, plan.getstate()))
        return forward(self, pixels, truth, generator, plan)

    monkeypatch.setattr(ClickRollout, "forward", watched)
    training.train(settings(tmp_path, batch=1, accumulate=2), bank=bank)
    (a, b), (c, d) = seen[:2], seen[2:]
    assert a[1] == b[1] != c[1] == d[1]
    canvases = [pixels for pixels, _ in (a, b, c, d)]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(canvases, 2))


SCRIPT = """
import sys
from hrsam.cli import main
from tests.tiny_training import use_small_preset
use_small_preset()
sys.argv = ["hrsam", "train", *sys.argv[1:]]
main()
"""


def test_two_processes_equal_one_that_accumulates(tmp_path, folder):
    """Two of one canvas each, by torchrun over gloo; then one with two parts goes on with their run."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one = settings(tmp_path / "one", steps=3, batch=1, data=(str(folder),), accumulate=2)
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
        torch.testing.assert_close(b["model"][name], value, rtol=0, atol=1e-6, msg=name)
    for x, y in zip(log_lines(one), log_lines(run), strict=True):
        assert (y["step"], y["images"], y["clicks"], y["tokens"]) == (x["step"], x["images"], x["clicks"], x["tokens"])
        assert y["loss"] == pytest.approx(x["loss"], abs=1e-4)
    moved = run.model_copy(update={"accumulate": 2})
    assert step_of(training.train(moved)) == 3


def test_recomputed_blocks_change_nothing(tmp_path, bank, monkeypatch):
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    usual = load_state(training.train(settings(tmp_path / "a"), bank=bank))
    once = len(calls)
    run = settings(tmp_path / "b", recompute=True, graphs=False)
    assert_same_states(load_state(training.train(run, bank=bank)), usual)
    assert len(calls) == 3 * once  # once as before, and twice


def test_recomputing_and_graphs_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="set graphs=false with it"):
        settings(tmp_path, recompute=True)


def test_shards_are_refused(tmp_path, bank, monkeypatch):
    made = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: made)
    with pytest.raises(
        ValueError, match="FSDP is not supported, each device holds the whole model; start with torchrun"
    ):
        training.train(settings(tmp_path), bank=bank)


def test_a_picture_shows_object_mask_and_clicks(tmp_path, bank):
    run = settings(tmp_path, steps=1)
    training.train(run, bank=bank)
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("train/clicks")
    assert (shown.step, shown.width, shown.height) == (1, 128, 64)

    task = ClickTask(fresh_model(), bank, run)
    assert task.picture() is None
    plan = Plan(KINDS["click"])
    task.part(Part(0, 0, 1, run.phases[0], torch.Generator().manual_seed(4), plan, no_pieces))
    mask, clicks = task.witness.last_seen(64, 64)
    assert mask.shape == (64, 64)
    assert len(clicks) >= 2
    picture = task.picture()
    assert picture.shape == (64, 128, 3)
    left, right = np.split(picture, 2, axis=1)
    x, y = int(clicks[0].x), int(clicks[0].y)
    assert task.canvas[1][y, x]  # the first click is on the object
    red, green, blue = right[y, x].astype(int)
    assert green > max(red, blue)
    assert left[y, x, 1] < green


def test_other_photos_have_another_fingerprint(bank):
    assert fingerprint(bank) == fingerprint(bank.to("cpu"))
    for name in ("sizes", "colours", "boxes", "anchors"):
        assert fingerprint(replace(bank, **{name: getattr(bank, name) + 1})) != fingerprint(bank)
    assert fingerprint(replace(bank, names=("x", *bank.names[1:]))) != fingerprint(bank)
